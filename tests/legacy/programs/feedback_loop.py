# mypy: ignore-errors
"""Counts numbers down to zero in a loop."""

from sage.core.api.function.comap_function import BaseCoMapFunction
from sage.core.api.function.filter_function import FilterFunction
from sage.core.api.function.map_function import MapFunction
from sage.core.api.function.sink_function import SinkFunction
from sage.core.api.local_environment import LocalEnvironment

passed = []


class Merge(BaseCoMapFunction):
    def map0(self, data):
        return data

    def map1(self, data):
        return data


class Decrement(MapFunction):
    def execute(self, data):
        return data - 1


class Positive(FilterFunction):
    def execute(self, data):
        return data if data > 0 else None


class Collect(SinkFunction):
    def execute(self, data):
        passed.append(data)


def main():
    env = LocalEnvironment("feedback_loop")
    future = env.from_future("again")
    numbers = env.from_batch([3, 1, 5])
    lower = numbers.connect(future).comap(Merge).map(Decrement)
    lower.sink(Collect)
    lower.filter(Positive).fill_future(future)
    env.submit(autostop=True)
    return passed


if __name__ == "__main__":
    main()
