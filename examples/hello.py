"""The smallest pipeline: three names in, three greetings out."""

from sage import LocalEnvironment


def main() -> None:
    env = LocalEnvironment("hello")
    env.from_batch(["Ada", "Grace", "Alan"]).map(lambda name: f"Hello, {name}!").print()
    env.run()


if __name__ == "__main__":
    main()
