"""Streams from tasks of this process to a task of another one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sage._backends.pool import Doorbell
from sage._ray.parcels import Parcel, packed
from sage._ray.requests import SiteSide
from sage._remote.rpc import RpcClosedError
from sage._runtime.channel import Channel, ends
from sage.errors import FunctionError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._remote.tcp import TcpRpcClient
    from sage._runtime.task import Task
    from sage.records import Batch, Element


class Outlet(Channel):
    """The channel to a task of another process: a thread of its own takes batches and sends them there.

    The next batch is sent when the other process has put the last one into the inbox of the task, so that a slow task
    slows its producers wherever they are, and the records under way are bounded by both channels and one batch between.

    Args:
        task: the name of the task.
        find: returns the process that runs it.
        capacity_records: the bound of waiting records here.
        on_error: told why a batch was not taken in there.
    """

    is_remote = True

    def __init__(
        self, task: str, find: Callable[[], TcpRpcClient], capacity_records: int, on_error: Callable[[Exception], None]
    ) -> None:
        super().__init__(capacity_records)
        self._task = task
        self._find = find
        self._on_error = on_error
        self._doorbell = Doorbell()
        self._counting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._put_count = 0
        self._delivered_count = 0
        self._is_over = False
        self._waiting_for: list[tuple[int, Callable[[], None]]] = []

    def prepare(self, batch: Batch, refuse: Callable[[Batch, Exception], bool]) -> Element:
        """Return a batch as it travels; see `Channel.prepare`."""
        return packed(batch, refuse)

    def when_delivered(self, wake: Callable[[], None]) -> Callable[[], bool]:
        """Return a check whether all batches so far are in the inbox; see `Channel.when_delivered`.

        Batches are no longer delivered once the other process is gone, or has refused a batch.
        """
        with self._counting:
            count = self._put_count
            self._waiting_for.append((count, wake))
        return lambda: self._delivered_count >= count or self._is_over

    def put_nowait(self, port: int, element: Element, wake: Callable[[], None], *, force: bool = False) -> bool:
        """Put an element, and start to send if this is the first one; see `Channel.put_nowait`."""
        with self._counting:
            if self._thread is None:
                self._start()
            was_put = super().put_nowait(port, element, wake, force=force)
            self._put_count += was_put
        return was_put

    def _start(self) -> None:
        self.wake_consumer = self._doorbell.ring
        self._thread = threading.Thread(target=self._work, name=f"sage-to-{self._task}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            peer = self._find()
            while True:
                taken = self.get_nowait()
                if taken is None:
                    self._doorbell.wait(None)
                else:
                    # As much may wait here as there: together, no more than about two seconds of work.
                    self.resize(peer.ask(SiteSide.put, self._task, *taken))
                    self._delivered(1)
        except RpcClosedError:
            pass  # the job fails by the loss of that process; nobody may wait here for it
        except Exception as error:  # the other process could not take it in
            self._on_error(error)
        self._is_over = True
        self.close()
        self._delivered(0)

    def _delivered(self, count: int) -> None:
        """Count delivered batches, and wake waiters."""
        with self._counting:
            self._delivered_count += count
            over = [one for one in self._waiting_for if one[0] <= self._delivered_count or self._is_over]
            self._waiting_for = [one for one in self._waiting_for if one not in over]
        for _, wake in over:
            wake()


def take_in(task: Task, port: int, element: Element) -> int:
    """Put a batch from another process into the inbox of a task, wait for room there, and return its bound."""
    inbox = task.inbox
    assert inbox is not None
    if isinstance(element, Parcel):
        element = element.unpacked()
    doorbell = Doorbell()
    while not inbox.put_nowait(port, element, doorbell.ring):
        doorbell.wait(None)
    if inbox.enters is not None and ends(element):
        inbox.enters.add(-1)
    return inbox.capacity_records


def not_taken_in(operator: str, task: str, cause: Exception) -> FunctionError:
    """Return the error for records of an operator that the process of a task could not take in."""
    text = f'operator "{operator}" gave records that the process of task "{task}" cannot take in: {describe(cause)}'
    error = FunctionError(text, operator=operator)
    error.__cause__ = cause
    return hint(error, "Objects sent to another process are pickled and built again there.")
