"""What follows when the supervision itself fails, and when a call comes before its service is ready."""

from __future__ import annotations

import threading

import pytest

import sage
from sage._backends.threads import ThreadsBackend


class FaultyBackend(ThreadsBackend):
    """A backend whose clock breaks once a job runs, as a bug of ours would."""

    def __init__(self, broken: threading.Event) -> None:
        super().__init__()
        self._broken = broken

    def now(self) -> float:
        """Return the time, or fail."""
        if self._broken.is_set() and threading.current_thread().name == "sage-supervisor":
            raise RuntimeError("the clock is broken")
        return super().now()


def test_a_bug_in_the_supervision_is_raised_and_nobody_waits_for_ever() -> None:
    broken = threading.Event()
    env = sage.LocalEnvironment("crashed", backend=lambda: FaultyBackend(broken))
    env.from_batch([1]).sink(lambda _: broken.set())
    with pytest.raises(sage.JobErrorGroup, match="the supervision of job") as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.exceptions[0], sage.InternalError)
    assert "Please report it" in caught.value.exceptions[0].__notes__[0]


def test_a_call_before_the_service_is_ready_waits_for_it() -> None:
    may_start = threading.Event()

    class Slow:
        def setup(self) -> None:
            assert may_start.wait(10)

        def process(self, value: int) -> int:
            return value + 1

    with sage.LocalEnvironment("early") as env:
        handle = env.register_service("slow", Slow)
        env.from_source(lambda: None).sink(lambda _: None)
        env.submit()
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(handle.process(1)))
        caller.start()
        may_start.set()
        caller.join(10)
        assert answers == [2]
