# mypy: ignore-errors
"""A request fails inside the pipeline that answers it, and the caller handles the error."""

from sage.core.api.function.map_function import MapFunction
from sage.core.api.function.sink_function import SinkFunction
from sage.core.api.local_environment import LocalEnvironment
from sage.kernel.api.service.pipeline_service import (
    PipelineBridge,
    PipelineService,
    PipelineServiceSink,
    PipelineServiceSource,
)

outcomes = []


class Divide(MapFunction):
    def execute(self, data):
        return {"quotient": 12 // data["by"], "_response_queue": data["_response_queue"]}


class Ask(MapFunction):
    def execute(self, data):
        try:
            return self.call_service("divide", {"by": data})
        except ZeroDivisionError as error:
            return f"{type(error).__name__}: {error}"


class Collect(SinkFunction):
    def execute(self, data):
        outcomes.append(data)


def main():
    bridge = PipelineBridge()
    env = LocalEnvironment("failing_pipeline_service")
    env.register_service("divide", PipelineService, bridge)
    env.from_source(PipelineServiceSource, bridge, poll_interval=5.0).map(Divide).sink(PipelineServiceSink)
    env.from_batch([3, 0, 4]).map(Ask).sink(Collect)
    env.submit(autostop=True)
    return outcomes


if __name__ == "__main__":
    main()
