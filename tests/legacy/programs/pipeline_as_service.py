# mypy: ignore-errors
"""A pipeline answers the calls of another one, with the classes of the kernel as they are."""

from sage.kernel.api.function.batch_function import BatchFunction
from sage.kernel.api.function.map_function import MapFunction
from sage.kernel.api.function.sink_function import SinkFunction
from sage.kernel.api.local_environment import LocalEnvironment
from sage.kernel.api.service.pipeline_service import (
    PipelineBridge,
    PipelineService,
    PipelineServiceSink,
    PipelineServiceSource,
)

answers = []


class Numbers(BatchFunction):
    def __init__(self, numbers):
        super().__init__()
        self.requests = [*({"number": number} for number in numbers), {"command": "shutdown"}]

    def execute(self):
        return self.requests.pop(0) if self.requests else None


class Square(MapFunction):
    def execute(self, data):
        return {
            "result": data["number"] ** 2,
            "original": data["number"],
            "_response_queue": data["_response_queue"],
        }


class CallSquare(MapFunction):
    def execute(self, data):
        return self.call_service("squares", data, timeout=10.0)


class Collect(SinkFunction):
    def execute(self, data):
        answers.append(data)


def main():
    bridge = PipelineBridge()
    env = LocalEnvironment("pipeline_as_service")
    env.register_service("squares", PipelineService, bridge)
    env.from_source(PipelineServiceSource, bridge).map(Square).sink(PipelineServiceSink)
    env.from_batch(Numbers, [1, 2, 3, 4, 5]).map(CallSquare).sink(Collect)
    env.submit(autostop=True)
    return answers, bridge.is_closed


if __name__ == "__main__":
    main()
