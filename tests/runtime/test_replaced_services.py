"""Services that take the place of others: every handle that was given out leads to the new one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from sage import LocalEnvironment, MapFunction, ServiceOptions, UnknownServiceError
from sage.testing import run


class Real:
    def __init__(self, word: str = "real") -> None:
        self.word = word

    def process(self, data: Any) -> str:
        return f"{self.word} {data}"


class Fake:
    def __init__(self, word: str = "fake") -> None:
        self.word = word
        self.asked: list[Any] = []

    def process(self, data: Any) -> str:
        self.asked.append(data)
        return f"{self.word} {data}"

    def only_here(self, data: Any) -> str:
        return f"only {data}"


class Through:
    """A service that calls another one through a handle that was given to its constructor."""

    def __init__(self, other: Any) -> None:
        self._other = other

    def process(self, data: Any) -> str:
        return f"through {self._other.process(data)}"


class ByName(MapFunction):
    def execute(self, data: Any) -> Any:
        return self.call_service("real", data)


class ByHandle(MapFunction):
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def execute(self, data: Any) -> Any:
        return self._handle.process(data)


def replaced_by_register(env: LocalEnvironment) -> None:
    env.register_service("real", Fake, options=ServiceOptions(replace=True))


WAYS = [
    replaced_by_register,
    lambda env: env.use("real", Fake),
    lambda env: env.use("real", Fake()),
    lambda env: env.use("real", lambda: Fake()),
    lambda env: env.use("real", partial(Fake, "fake")),
    lambda env: env.use("real", Fake, word="fake"),
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_leads_to_the_new_service(way: Any) -> None:
    env = LocalEnvironment("replaced")
    handle: Any = env.register_service("real", Real)
    method = handle.process
    through = env.register_service("through", Through, handle)
    found: list[Any] = []
    stream = env.from_batch([1])
    functions: list[Any] = [handle, handle.process, method, through, lambda x: handle(x), ByName, ByHandle(handle)]
    for function in functions:
        stream.map(function).sink(found.append)
    way(env)
    stream.map(lambda x: handle.only_here(x)).sink(found.append)
    env.submit(autostop=True)
    assert sorted(found) == ["fake 1"] * 6 + ["only 1", "through fake 1"]


def test_a_service_may_be_replaced_between_two_jobs() -> None:
    with LocalEnvironment("twice") as env:
        handle = env.register_service("real", Real)
        found: list[Any] = []
        env.from_batch([1]).map(handle).sink(found.append)
        env.submit(autostop=True, keep_services=True)
        for _ in range(2):
            env.use("real", Fake("next"))
            env.submit(autostop=True, keep_services=True)
        assert found == ["real 1", "next 1", "next 1"]
        assert handle.process(2) == "next 2"


def test_a_command_may_be_replaced_by_a_stand_in() -> None:
    class Server:
        url = "http://stand-in"

    env = LocalEnvironment("commands")
    server = env.register_command("server", ["not-there-at-all"])
    found: list[str] = []
    env.from_batch([1]).map(lambda x: f"{server.url}/{x}").sink(found.append)
    env.use("server", Server)
    env.submit(autostop=True)
    assert found == ["http://stand-in/1"]


def test_only_a_registered_service_is_replaced() -> None:
    env = LocalEnvironment("unknown")
    env.register_service("real", Real)
    with pytest.raises(UnknownServiceError, match=r'use\("reel", ...\) uses service "reel", which is not') as caught:
        env.use("reel", Fake)
    assert 'Registered: "real"' in caught.value.__notes__[0]


def test_a_pipeline_is_tested_with_services_of_the_test() -> None:
    fake = Fake("given")
    assert run([1, 2], lambda stream: stream.map(ByName), services={"real": fake}) == ["given 1", "given 2"]
    assert fake.asked == [1, 2]
    assert run([1], lambda stream: stream.map(ByName), services={"real": Real}) == ["real 1"]
