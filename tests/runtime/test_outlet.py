"""The channel to a task of another process: what was put counts as delivered when it has arrived there."""

from __future__ import annotations

import threading
from typing import Any, cast

from sage._ray.parcels import Parcel
from sage._ray.streams import Outlet
from sage._remote.rpc import RpcClosedError
from sage.records import END_OF_STREAM, Batch

BOUND_S = 10.0


class OtherProcess:
    """Takes each batch in when it may, and then answers as told."""

    def __init__(self, answer: int | Exception = 4096) -> None:
        self.taken: list[Any] = []
        self.may_answer = threading.Semaphore(0)
        self._answer = answer

    def ask(self, *request: Any) -> int:
        self.may_answer.acquire(timeout=BOUND_S)
        if isinstance(self._answer, Exception):
            raise self._answer
        self.taken.append(request)
        return self._answer


def outlet_to(other: OtherProcess, failures: list[Exception]) -> Outlet:
    return Outlet("task", lambda: cast("Any", other), 4096, failures.append)


def nobody() -> None:
    """Stands for a producer that need not be woken."""


def never(record: Batch, error: Exception) -> bool:
    raise AssertionError((record, error))


def test_a_task_can_wait_until_its_last_record_has_arrived() -> None:
    other = OtherProcess()
    outlet = outlet_to(other, [])
    outlet.put_nowait(0, outlet.prepare(Batch([1, 2]), never), nobody)
    outlet.put_nowait(0, END_OF_STREAM, nobody)
    woken = threading.Event()
    is_delivered = outlet.when_delivered(woken.set)
    other.may_answer.release()
    assert not is_delivered()
    other.may_answer.release()
    assert woken.wait(BOUND_S)
    assert is_delivered()
    (_, _, _, parcel), (_, _, _, end) = other.taken
    assert isinstance(parcel, Parcel)
    assert parcel.unpacked().values == [1, 2]
    assert end is END_OF_STREAM


def test_nobody_waits_for_a_process_that_is_gone_or_refuses() -> None:
    for answer, told in ((RpcClosedError("gone"), []), (refused := ValueError("no"), [refused])):
        failures: list[Exception] = []
        other = OtherProcess(answer)
        outlet = outlet_to(other, failures)
        outlet.put_nowait(0, outlet.prepare(Batch([1]), never), nobody)
        woken = threading.Event()
        is_delivered = outlet.when_delivered(woken.set)
        other.may_answer.release()
        assert woken.wait(BOUND_S)
        assert is_delivered()
        assert failures == told


def test_it_holds_as_much_as_the_queue_there() -> None:
    other = OtherProcess(answer=3)
    outlet = outlet_to(other, [])
    woken = threading.Event()
    outlet.put_nowait(0, outlet.prepare(Batch([1]), never), nobody)
    is_delivered = outlet.when_delivered(woken.set)
    other.may_answer.release()
    assert woken.wait(BOUND_S)
    assert is_delivered()
    assert outlet.capacity_records == 3
    accepted = 0
    while outlet.put_nowait(0, outlet.prepare(Batch([1, 2, 3]), never), nobody):
        accepted += 1
    assert 1 <= accepted <= 2  # one that waits here, and perhaps one that is on its way already
    for _ in range(2):
        other.may_answer.release()
    outlet.close()
