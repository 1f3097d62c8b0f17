"""A loop in the graph: each number goes round by the rule of Collatz until it is 1, and then the job ends by itself."""

from dataclasses import dataclass, replace

from sage import LocalEnvironment


@dataclass(frozen=True)
class Walk:
    start: int
    number: int
    steps: int = 0


def step(walk: Walk) -> Walk:
    number = walk.number // 2 if walk.number % 2 == 0 else 3 * walk.number + 1
    return replace(walk, number=number, steps=walk.steps + 1)


def main() -> None:
    env = LocalEnvironment("feedback loop")
    again = env.from_future("again")
    walks = env.from_batch([Walk(number, number) for number in (6, 7, 27)])
    stepped = walks.union(again).map(step)
    stepped.filter(lambda walk: walk.number != 1).fill_future(again)
    ended: list[Walk] = []
    stepped.filter(lambda walk: walk.number == 1).sink(ended.append)
    env.run()
    for walk in sorted(ended, key=lambda walk: walk.start):
        print(f"{walk.start} reaches 1 after {walk.steps} steps")


if __name__ == "__main__":
    main()
