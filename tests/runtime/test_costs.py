"""How long an operator's calls take: a machine without a free processor makes no cheap function look costly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from sage._operators.costs import CALLS_SEEN, COSTLY_S, Costs
from sage._processes import processor_wait_s
from sage._runtime.pace import TimedPace


class Waits(list[float]):
    """The seconds that a thread has waited for a processor, each time that it did."""

    def __init__(self) -> None:
        self.costs = Costs(TimedPace(lambda: sum(self)).running_s)

    def measured(self, call_s: float, wait_s: float) -> None:
        """Let a call take so long, beside a wait."""
        self.append(wait_s)
        self.costs.measured(1, call_s + wait_s)


def test_a_call_that_waited_for_a_processor_is_cheap() -> None:
    waits = Waits()
    for _ in range(CALLS_SEEN):
        waits.measured(0.001, 0.2)
        assert not waits.costs.are_high
    assert waits.costs.typical_s == pytest.approx(0.001)


def test_a_call_that_takes_long_is_costly_on_a_busy_machine() -> None:
    waits = Waits()
    for _ in range(CALLS_SEEN):
        waits.measured(0.05, 0.2)
        assert waits.costs.are_high


def test_waits_before_the_first_call_hide_no_other() -> None:
    waits = Waits()
    waits.append(60.0)
    waits.measured(0.05, 0.0)
    waits.measured(0.05, 0.0)
    waits.measured(0.05, 0.0)
    assert waits.costs.are_high


def test_two_calls_that_something_else_delayed_change_nothing() -> None:
    costs = Costs(lambda elapsed_s: elapsed_s)
    for elapsed_s in (0.001, 0.5, 0.001, 0.5, 0.001, 0.001, 0.001, 0.5, 0.5):
        costs.measured(1, elapsed_s)
        assert not costs.are_high
    costs.measured(1, 0.5)
    assert costs.are_high


def test_the_first_calls_have_to_be_clearly_costly() -> None:
    """Whether something delayed both of two calls cannot be known; of five, it cannot be most."""
    costs = Costs(lambda elapsed_s: elapsed_s)
    for _ in range(CALLS_SEEN - 1):
        costs.measured(1, 1.5 * COSTLY_S)
        assert not costs.are_high
    costs.measured(1, 1.5 * COSTLY_S)
    assert costs.are_high


def test_the_system_counts_the_waits_of_the_calling_thread() -> None:
    """Two programs that never pause, on one processor, wait for each other."""
    processor = {min(os.sched_getaffinity(0))}
    waited: list[float] = []

    def spin() -> None:
        os.sched_setaffinity(0, processor)
        before_s, until = processor_wait_s(), time.monotonic() + 30
        while processor_wait_s() - before_s < COSTLY_S and time.monotonic() < until:
            pass
        waited.append(processor_wait_s() - before_s)

    program = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program, str(min(processor))]) as other:
        thread = threading.Thread(target=spin)
        thread.start()
        thread.join()
        other.kill()
    assert waited[0] >= COSTLY_S
