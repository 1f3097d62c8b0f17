"""Words counted by Pathway and by Spark, where they are installed; they are too large to be installed for all."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Figure, Scale, alternated, at_least
from benchmarks.throughput import added, count_by_sage, lines_of, pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.throughput import Pair

TARGETS = {"pathway": ("times Pathway", 6.0), "pyspark": ("times a Spark RDD", 4.0)}


def peers(scale: Scale) -> Iterator[Figure]:
    """The word count against each of them, apart from each other."""
    lines = lines_of(scale)
    for name, (unit, target) in TARGETS.items():
        if find_spec(name) is None:
            print(f"{name} is not installed: its case is left out")
            continue
        count, end = STARTS[name](lines)
        expected: list[Pair] = []
        count_by_sage(lines, expected)
        assert sorted(count()) == sorted(expected), f"{name} counts something else"
        taken = alternated(scale.rounds // 3, lambda: count_by_sage(lines, []), count)
        end()
        yield at_least("word count", unit, target, [seconds[1] / seconds[0] for seconds in taken])


def pathway_of(lines: list[str]) -> tuple[Callable[[], list[Any]], Callable[[], None]]:
    """Return what counts by Pathway, as a batch of one worker, and what ends it."""
    import pathway as pw

    class Line(pw.Schema):
        line: str

    def count() -> list[Any]:
        pw.internals.parse_graph.G.clear()
        table = pw.debug.table_from_rows(Line, [(line,) for line in lines])
        words = table.select(word=pw.apply(str.split, table.line)).flatten(pw.this.word)
        counts = words.groupby(pw.this.word).reduce(pw.this.word, count=pw.reducers.count())
        _, columns = pw.debug.table_to_dicts(counts)
        return [(columns["word"][key], columns["count"][key]) for key in columns["word"]]

    return count, lambda: None


def spark_of(lines: list[str]) -> tuple[Callable[[], list[Any]], Callable[[], None]]:
    """Return what counts by an RDD of one local worker, whose data is cached before, and what ends it."""
    from pyspark import SparkConf, SparkContext

    os.environ["PYSPARK_PYTHON"] = sys.executable
    conf = SparkConf().setMaster("local[1]").set("spark.ui.enabled", "false")
    context = SparkContext(conf=conf)
    context.setLogLevel("ERROR")
    rdd = context.parallelize(lines, 1).cache()
    rdd.count()

    def count() -> list[Any]:
        summed: list[Any] = rdd.flatMap(pairs).map(lambda pair: (pair[0], pair)).reduceByKey(added).values().collect()
        return summed

    return count, context.stop


STARTS: dict[str, Callable[[list[str]], tuple[Callable[[], list[Any]], Callable[[], None]]]] = {
    "pathway": pathway_of,
    "pyspark": spark_of,
}
