# mypy: ignore-errors
"""Counts words by key, in parallel tasks that each keep the counts of their own keys."""

import threading

from sage.common.core.functions import FlatMapFunction, KeyByFunction, MapFunction, SinkFunction
from sage.core.api.local_environment import LocalEnvironment

LINES = ["to be or not to be", "that is the question", "to sleep to dream"]

lock = threading.Lock()
counts = {}
tasks_of = {}


class Split(FlatMapFunction):
    def execute(self, data):
        for word in data.split():
            self.collect(word)


class Word(KeyByFunction):
    def execute(self, data):
        return data


class Count(MapFunction):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def execute(self, data):
        key = self.ctx.get_key()
        self.seen[key] = self.seen.get(key, 0) + 1
        return key, self.seen[key], self.ctx.parallel_index


class Collect(SinkFunction):
    def execute(self, data):
        word, count, task = data
        with lock:
            counts[word] = max(count, counts.get(word, 0))
            tasks_of.setdefault(word, set()).add(task)


def main():
    env = LocalEnvironment("word_count")
    words = env.from_batch(LINES).flatmap(Split)
    words.keyby(Word, strategy="hash").map(Count, parallelism=3).sink(Collect, parallelism=2)
    env.submit(autostop=True)
    return counts, tasks_of


if __name__ == "__main__":
    main()
