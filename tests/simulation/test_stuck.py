"""A backend that cannot go on says so to whoever waits, instead of being asked again for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sage import LocalEnvironment
from sage.errors import InternalError
from sage.testing import StepBackend

if TYPE_CHECKING:
    from sage._runtime.backend import SupervisedJob


class Stuck(StepBackend):
    """Cannot go on until it is told that it can."""

    is_stuck = True

    def turn(self, supervisor: SupervisedJob) -> None:
        if self.is_stuck:
            raise InternalError("nothing can go on")
        super().turn(supervisor)


def test_a_stuck_backend_is_heard_of() -> None:
    backend = Stuck()
    env = LocalEnvironment("test", backend=lambda: backend)
    arrived: list[int] = []
    env.from_batch([1, 2]).sink(arrived.append)
    job = env.submit()
    with pytest.raises(InternalError, match="nothing can go on"):
        job.wait()
    backend.is_stuck = False
    job.wait()
    assert arrived == [1, 2]
