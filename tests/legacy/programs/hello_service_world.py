# mypy: ignore-errors
"""A sink calls a service whose constructor does not call that of its parent."""

from sage.kernel.api.function.batch_function import BatchFunction
from sage.kernel.api.function.sink_function import SinkFunction
from sage.kernel.api.local_environment import LocalEnvironment
from sage.kernel.api.service.base_service import BaseService

said = []
hooks = []


class HelloService(BaseService):
    def __init__(self, greeting="Hello service!"):
        self.greeting = greeting

    def setup(self):
        hooks.append("setup")

    def hello(self, number):
        self.logger.info("hello was called")
        return f"{self.greeting} #{number}"

    def stop(self):
        hooks.append("stop")

    def cleanup(self):
        hooks.append("cleanup")


class NumberBatch(BatchFunction):
    def __init__(self, count):
        super().__init__()
        self.left = count

    def execute(self):
        if self.left == 0:
            return None
        self.left -= 1
        return self.left


class CallingSink(SinkFunction):
    def execute(self, data):
        said.append(self.call_service("hello_service", data, method="hello", timeout=10))


def main():
    env = LocalEnvironment("hello_service_world")
    env.register_service("hello_service", HelloService, greeting="Good day!")
    env.from_batch(NumberBatch, 3).sink(CallingSink)
    env.submit(autostop=True)
    return said, list(hooks)


if __name__ == "__main__":
    main()
