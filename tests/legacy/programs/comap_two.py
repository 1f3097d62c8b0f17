# mypy: ignore-errors
"""Temperatures and pressures go through one function that has a method for each."""

from sage.core.api.function.comap_function import BaseCoMapFunction
from sage.core.api.local_environment import LocalEnvironment
from sage.foundation import BatchFunction, SinkFunction

results = []


class Readings(BatchFunction):
    def __init__(self, values):
        super().__init__()
        self.values = list(values)

    def execute(self):
        return self.values.pop(0) if self.values else None


class Describe(BaseCoMapFunction):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.hottest = None

    def map0(self, data):
        self.hottest = data if self.hottest is None else max(self.hottest, data)
        return f"hot {data}" if data > self.limit else None

    def map1(self, data):
        return f"pressure {data}"


class Collect(SinkFunction):
    def execute(self, data):
        results.append(data)


def main():
    env = LocalEnvironment("comap_two")
    temperatures = env.from_batch(Readings, [20, 31, 35])
    pressures = env.from_batch(Readings, range(1, 61))
    temperatures.connect(pressures).comap(Describe, 30).sink(Collect)
    env.submit(autostop=True)
    return results


if __name__ == "__main__":
    main()
