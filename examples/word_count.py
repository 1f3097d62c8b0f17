"""Count words in parallel: the same word always goes to the same task, so each task counts its own words."""

from collections.abc import Iterator

from sage import LocalEnvironment

LINES = [
    "to be or not to be that is the question",
    "the play is the thing",
    "all the world is a stage",
]


def words(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


def add(total: tuple[str, int], more: tuple[str, int]) -> tuple[str, int]:
    return total[0], total[1] + more[1]


def main() -> None:
    env = LocalEnvironment("word count")
    counts: list[tuple[str, int]] = []
    (
        env.from_batch(LINES)
        .flatmap(words)
        .keyby(lambda pair: pair[0])
        .reduce(add, emit="last", parallelism=4)
        .sink(counts.append)
    )
    env.run()
    for word, count in sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:5]:
        print(f"{count}  {word}")


if __name__ == "__main__":
    main()
