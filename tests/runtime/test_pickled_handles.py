"""Handles of services that travel as bytes."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from sage import BaseService, LocalEnvironment, ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


class Named:
    """Tells which instance it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def process(self, data: Any) -> str:
        return f"{self._name} got {data}"

    def recall(self, data: Any) -> str:
        return f"{self._name} recalls {data}"


class Asking(BaseService):
    """Is given the bytes of another service's handle."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def process(self, data: Any) -> Any:
        return pickle.loads(self._pickled)(data)


def environment(name: str, backend: Backends) -> tuple[LocalEnvironment, bytes]:
    env = LocalEnvironment(name, backend=backend)
    handle = env.register_service("named", Named, name)
    return env, pickle.dumps((handle, handle.recall))


def test_an_unpickled_handle_calls_the_service_of_the_job_around(backend: Backends) -> None:
    arrived: list[Any] = []

    def ask(data: int) -> tuple[str, str, str]:
        handle, method = pickle.loads(pickled)
        return handle(data), handle.recall(data), method(data)

    for name in ("first", "second"):
        env, pickled = environment(name, backend)
        env.from_batch([1]).map(ask).sink(arrived.append)
        env.submit(autostop=True)
    assert arrived == [(f"{name} got 1", f"{name} recalls 1", f"{name} recalls 1") for name in ("first", "second")]


def test_a_service_may_unpickle_a_handle_too(backend: Backends) -> None:
    arrived: list[str] = []
    env = LocalEnvironment("test", backend=backend)
    handle = env.register_service("named", Named, "it")
    asking = env.register_service("asking", Asking, pickle.dumps(handle))
    env.from_batch([1]).map(asking).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == ["it got 1"]


def test_a_handle_unpickled_outside_of_a_job_says_so_when_it_is_used(backend: Backends) -> None:
    _, pickled = environment("never run", backend)
    handle, method = pickle.loads(pickled)
    for use in (handle, handle.recall, method):
        text = 'the handle of service "named" was unpickled outside of a job that runs it'
        with pytest.raises(ServiceUnavailableError, match=text) as caught:
            use(1)
        assert caught.value.__notes__ == ["Unpickle it in a function or a service of that job, from open() on."]


def test_a_copy_of_a_handle_is_the_handle() -> None:
    handle = LocalEnvironment("test").register_service("named", Named, "it")
    assert copy.copy(handle) is copy.deepcopy(handle) is handle
    method = handle.recall
    assert copy.copy(method) is copy.deepcopy(method) is method
