# mypy: ignore-errors
"""A batch of greetings goes through a map into a sink."""

from sage.common.utils.logging.custom_logger import CustomLogger
from sage.core.api.function.batch_function import BatchFunction
from sage.core.api.function.map_function import MapFunction
from sage.core.api.function.sink_function import SinkFunction
from sage.core.api.local_environment import LocalEnvironment

printed = []


class HelloBatch(BatchFunction):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.counter = 0
        self.max_count = 5

    def execute(self):
        if self.counter >= self.max_count:
            return None
        self.counter += 1
        return f"Hello, World! #{self.counter}"


class UpperCaseMap(MapFunction):
    def execute(self, data):
        return data.upper()


class PrintSink(SinkFunction):
    def execute(self, data):
        print(data)
        printed.append(data)


def main():
    env = LocalEnvironment("hello_world")
    env.from_batch(HelloBatch).map(UpperCaseMap).sink(PrintSink)
    env.submit(autostop=True)
    return printed


if __name__ == "__main__":
    CustomLogger.disable_global_console_debug()
    main()
