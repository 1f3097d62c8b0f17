"""Streams from tasks of this process to a task of another one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sage._backends.threads import Doorbell
from sage._hosts.link import LinkClosedError, NotSentError
from sage._runtime.channel import Channel, ends
from sage.errors import JobError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._ray.mesh import Peer
    from sage._runtime.task import Task
    from sage.records import Element


class Outlet(Channel):
    """The channel to a task of another process: a thread of its own takes what is put and sends it there.

    The next batch is sent when the other process has put the last one into the inbox of the task, so that a slow task
    slows its producers wherever they are, and what is under way is bounded by both channels and one batch between.

    Args:
        task: the name of the task.
        find: returns the process that runs it.
        capacity_records: the bound of what waits here.
        on_error: told why a batch could not be sent.
    """

    def __init__(
        self, task: str, find: Callable[[], Peer], capacity_records: int, on_error: Callable[[Exception], None]
    ) -> None:
        super().__init__(capacity_records)
        self._task = task
        self._find = find
        self._on_error = on_error
        self._doorbell = Doorbell()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def put_nowait(self, port: int, element: Element, wake: Callable[[], None], *, force: bool = False) -> bool:
        """Put an element, and start to send if this is the first one; see `Channel.put_nowait`."""
        if self._thread is None:
            self._start()
        return super().put_nowait(port, element, wake, force=force)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
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
                    peer.ask("put", self._task, *taken)
        except LinkClosedError:
            self.close()  # the job fails by the loss of that process; nobody may wait here for it
        except NotSentError as error:
            failed = JobError(
                f'records for task "{self._task}" cannot be sent to its process: {describe(error.reason)}'
            )
            failed.__cause__ = error.reason
            self._on_error(hint(failed, "What goes from one process to another is pickled."))
            self.close()
        except Exception as error:  # the other process could not take it in
            failed = JobError(f'records for task "{self._task}" were not taken in by its process: {describe(error)}')
            failed.__cause__ = error
            self._on_error(failed)
            self.close()


def take_in(task: Task, port: int, element: Element) -> None:
    """Put what came from another process into the inbox of a task, and wait for room there."""
    inbox = task.inbox
    assert inbox is not None
    doorbell = Doorbell()
    while not inbox.put_nowait(port, element, doorbell.ring):
        doorbell.wait(None)
    if inbox.enters is not None and ends(element):
        inbox.enters.add(-1)
