"""A pipeline that answers calls: another pipeline of the same job, or any service, calls it like a function."""

from sage import LocalEnvironment


class Prices:
    """A plain class as a service; its `close` is called when the job ends."""

    def __init__(self) -> None:
        self.known = {"apple": 3, "pear": 4}

    def price(self, fruit: str) -> int | None:
        return self.known.get(fruit)

    def close(self) -> None:
        print("prices are closed")


def main() -> None:
    env = LocalEnvironment("serve pipeline")
    prices = env.register_service("prices", Prices)

    # The answer to a request is what arrives at the end of this pipeline; what is filtered out is answered by None.
    appraise = env.serve(
        "appraise",
        lambda requests: (
            requests.map(str.lower)
            .map(lambda fruit: (fruit, prices.price(fruit)))
            .filter(lambda pair: pair[1] is not None)
            .map(lambda pair: f"one {pair[0]} is {pair[1]} coins")
        ),
    )

    orders = env.from_batch(["Apple", "plum", "PEAR"])
    orders.map(lambda order: f"{order}: {appraise.process(order) or 'not for sale'}").print()
    env.run()


if __name__ == "__main__":
    main()
