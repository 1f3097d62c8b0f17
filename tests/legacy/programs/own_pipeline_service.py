# mypy: ignore-errors
"""A pipeline as a service with classes of the program's own, which calls another service on its way."""

from sage.common.core import BatchFunction, MapFunction, SinkFunction, SourceFunction
from sage.kernel.api.local_environment import LocalEnvironment
from sage.kernel.api.service.pipeline_service import (
    PipelineBridge,
    PipelineService,
    PipelineServiceSink,
    PipelineServiceSource,
)
from sage.kernel.runtime.communication.router.packet import StopSignal
from sage.platform.service import BaseService

decisions = []


class Stock(BaseService):
    def __init__(self):
        self.left = {"tea": 1, "ink": 5}

    def take(self, what):
        self.left[what] -= 1
        return self.left[what] >= 0


class Orders(PipelineServiceSource):
    """Marks each request before it goes on."""

    def __init__(self, bridge):
        super().__init__(bridge, poll_interval=0.05)
        self.number = 0

    def execute(self):
        data = super().execute()
        if data is None or isinstance(data, StopSignal):
            return data
        self.number += 1
        return {**data, "number": self.number}


class Mirrored(SourceFunction):
    """Takes requests from the bridge by itself."""

    def __init__(self, bridge):
        super().__init__()
        self.bridge = bridge

    def execute(self, data=None):
        request = self.bridge.next(timeout=0.1)
        if request is None or isinstance(request, StopSignal):
            return request
        payload = dict(request.payload)
        payload["_response_queue"] = request.response_queue
        return payload


class Decide(MapFunction):
    def execute(self, data):
        data["accepted"] = self.call_service("stock", data["what"], method="take")
        return data


class Turn(MapFunction):
    def execute(self, data):
        data["what"] = data["what"][::-1]
        return data


class Reply(PipelineServiceSink):
    def execute(self, data):
        data["by"] = "Reply"
        super().execute(data)


class Send(SinkFunction):
    def execute(self, data):
        queue = data.pop("_response_queue")
        queue.put(data)


class OrderService(PipelineService):
    def __init__(self, bridge):
        super().__init__(bridge, request_timeout=20)

    def process(self, message):
        answer = super().process(message)
        return answer["number"], answer["what"], answer["accepted"], answer["by"]


class MirrorService(BaseService):
    def __init__(self, bridge):
        self.bridge = bridge

    def process(self, message):
        return self.bridge.submit(message).get(timeout=20)["what"]

    def stop(self):
        self.bridge.close()


class Customers(BatchFunction):
    def __init__(self):
        super().__init__()
        self.wishes = ["tea", "tea", "ink"]

    def execute(self):
        return {"what": self.wishes.pop(0)} if self.wishes else None


class Order(MapFunction):
    def execute(self, data):
        first = self.call_service_async("orders", data)
        return (*first.result(timeout=20), self.call_service("mirror", data))


class Collect(SinkFunction):
    def execute(self, data):
        decisions.append(data)


def main():
    orders, mirrored = PipelineBridge(), PipelineBridge()
    env = LocalEnvironment("own_pipeline_service")
    env.register_service("stock", Stock)
    env.register_service("orders", OrderService, orders)
    env.register_service("mirror", MirrorService, mirrored)
    env.from_source(Orders, orders).map(Decide).sink(Reply)
    env.from_source(Mirrored, mirrored).map(Turn).sink(Send)
    env.from_batch(Customers).map(Order).sink(Collect)
    env.submit(autostop=True)
    return decisions, [orders.is_closed, mirrored.is_closed]


if __name__ == "__main__":
    main()
