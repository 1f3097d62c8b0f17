"""A service's handle stands where a function stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sage import LocalEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend


class Doubler:
    def __init__(self) -> None:
        self.closed = 0

    def process(self, number: int) -> int:
        return 2 * number

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("parallelism", [1, 2])
def test_the_handle_itself_calls_process(backend: Callable[[], Backend], parallelism: int) -> None:
    doubler = Doubler()
    env = LocalEnvironment("handle", backend=backend)
    handle = env.register_service("doubler", lambda: doubler)
    arrived: list[int] = []
    env.from_batch([1, 2, 3]).map(handle, parallelism=parallelism).sink(arrived.append)
    job = env.submit(autostop=True)
    assert sorted(arrived) == [2, 4, 6]
    assert job.report is not None
    assert job.report.service("doubler").calls == 3
    # `close` is a hook of the service here, and no operator takes it for its own.
    assert doubler.closed == 1
