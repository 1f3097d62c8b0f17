"""The loop that goes one round at a time."""

from __future__ import annotations

import threading

import pytest

from sage._testing.stepped_loop import SteppedLoop
from sage.testing import ManualClock


@pytest.mark.parametrize("added_s", [2.0**-44, 3 * 2.0**-44, 0.1, 1 / 3])
@pytest.mark.parametrize("now_s", [1000.0, 1000.003, 1023.999])
def test_what_is_due_is_ready_when_the_clock_gets_there(added_s: float, now_s: float) -> None:
    clock = ManualClock(now_s)
    loop = SteppedLoop(clock)
    loop._added_s = added_s  # as if threads had waited for coroutines for so long
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    called: list[float] = []
    for count in range(1, 50):
        loop.call_soon_threadsafe(loop.call_later, count / 1000, lambda: called.append(clock.now_s))
        loop.go_round()
        assert loop.due is not None
        clock.now_s = loop.due
        assert loop.is_ready
        loop.go_round()
    loop.call_soon_threadsafe(loop.stop)
    with loop.going_on():
        thread.join()
    loop.close()
    assert len(called) == 49
