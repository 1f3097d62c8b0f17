"""Coroutine functions, many at a time on the event loop of the job."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from contextlib import suppress
from contextvars import copy_context
from time import time
from typing import TYPE_CHECKING, Any

from sage._current_job import key_here
from sage._operators.holder import BufferingOperator
from sage.errors import short
from sage.functions import TaskContext
from sage.records import Batch

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sage._operators.operator import OperatorContext
    from sage._plan.logical import Node
    from sage.records import RecordRequest

MEASURED_EVERY = 8
"""One call of so many is measured, after the first ones."""


class CoroutineContext(TaskContext):
    """A context in which each coroutine sees the key of its own record."""

    @property
    def key(self) -> object:
        """The key of the record for which the current coroutine runs."""
        return key_here.get()

    @key.setter
    def key(self, value: object) -> None:
        key_here.set(value)


class Slot:
    """A record in flight, and its outcome; one that is given back got no result, as no further attempt begins."""

    __slots__ = (
        "attempts",
        "began_at",
        "error",
        "is_done",
        "is_given_back",
        "is_measured",
        "is_pausing",
        "key",
        "request",
        "result",
        "task",
        "value",
    )

    def __init__(self, value: object, key: object, request: RecordRequest | None) -> None:
        self.value = value
        self.key = key
        self.request = request
        self.result: object = None
        self.error: BaseException | None = None
        self.attempts = 0
        self.began_at = 0.0
        self.is_done = False
        self.is_given_back = False
        self.is_pausing = False
        self.is_measured = False
        self.task: asyncio.Task[None] | None = None


class MapAsync(BufferingOperator):
    """One record out for each record in, as coroutines give them.

    Records wait in one queue, from which the loop starts the next call when one ends, without asking the task. Both
    threads share lists and numbers, but only one of them changes each end of a list, and each number.

    No more than `concurrency` calls run, and no more results wait to go on.
    """

    is_costly = True

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        given = surroundings.context
        about = (given.name, given._services, given.parallel_index, given.parallelism, given._stopping)
        self.context = CoroutineContext(*about)
        self.concurrency: int = node.settings["concurrency"]
        # Some wait here, so that the next call begins without the task, unless the user bounds how many wait.
        self._room: int = self.concurrency if node.settings.get("capacity") else 2 * self.concurrency
        self._timeout_s: float | None = node.settings["timeout_s"]
        self._is_ordered: bool = node.settings["ordered"]
        self._has_keys = False
        self._has_requests = False
        # The task adds at the end of these, and the loop takes from the front of the first.
        self._waiting: deque[Slot] = deque()
        self._order: deque[Slot] = deque()
        self._unordered: dict[Slot, None] = {}  # all slots of a durable job whose results go on as they come
        self._handed_on = 0
        # The loop adds at the end, and the task takes from the front.
        self._done: deque[Slot] = deque()
        self._running: set[Slot] = set()
        self._started = 0
        # Flags tell which wake-ups the other side needs, or has had already.
        self._is_posted = False
        self._is_rung = False
        self._is_full = False
        self._is_held_back = False
        self._is_dropped = False
        self._is_cancelled = False
        self._thread_id = 0
        self._full_at: float | None = None  # since when no further call may run, as the loop sees it

    def prepare(self) -> None:
        """Bind the function; a function class that returns None drops the record, as for `map`."""
        self._call: Callable[..., Any] = self.target_of()
        self._drops_none = self.is_function_class
        self._around = copy_context()

    # --- on the thread of the task ---

    @property
    def has_room(self) -> bool:
        """Whether fewer records are held than the loop may work through before it is asked again."""
        return self.held < self._room

    def take(self, batch: Batch) -> None:
        """Put records into the queue of the loop."""
        nothing = [None] * len(batch)
        slots = list(map(Slot, batch.values, batch.keys or nothing, batch.requests or nothing))
        self._has_keys = self._has_keys or batch.keys is not None
        self._has_requests = self._has_requests or batch.requests is not None
        self._add(slots)

    def _add(self, slots: list[Slot]) -> None:
        """Hold slots; those that are not done wait for a call."""
        self.held += len(slots)
        if self._is_ordered:
            self._order.extend(slots)
        elif self.left is not None:
            self._unordered.update(dict.fromkeys(slots))
        self._waiting.extend([slot for slot in slots if not slot.is_done])
        if not self._is_posted:
            self._is_posted = True
            self._surroundings.post(self._poked)

    def hand_on(self, *, is_all: bool, has_ended: bool) -> Batch | None:  # noqa: ARG002
        """Return the results that are there; a record that fails the job comes alone, when those before it are out."""
        self._is_rung = False
        done: list[Slot] = []
        ended = self._order if self._is_ordered else self._done
        while ended and ended[0].is_done:
            slot = ended[0]
            is_last = slot.error is not None and self.fails_job(slot.error, slot.request)
            if not (is_last and done):
                done.append(ended.popleft())
            if is_last:
                break
        if not done:
            return None
        self.held -= len(done)
        self._handed_on += len(done)
        if self._unordered:
            for slot in done:
                del self._unordered[slot]
        if self._is_full:
            self._is_full = False
            self._surroundings.post(self._poked)
        return self._batch_of(done)

    def drop(self) -> int:
        """Forget waiting records, and cancel the coroutines."""
        held, self.held = self.held, 0
        if held:
            self.is_quiet = False
            self._is_dropped = True
            self._surroundings.post(self._cancel)
        return held

    def hold_back(self) -> None:
        """Begin no further call or attempt from now on."""
        self._is_held_back = True
        self._surroundings.post(self._end_pauses)

    def give_back(self) -> int:
        """Forget the records that wait; each is taken from the queue once, here or by the loop."""
        given_back: list[Slot] = []
        with suppress(IndexError):
            while True:
                given_back.append(self._waiting.popleft())
        for slot in given_back:
            if self._is_ordered:
                self._order.pop()  # they came last
            elif self.left is not None:
                del self._unordered[slot]
        self.held -= len(given_back)
        if self.left is None:
            return len(given_back)
        self.left += [(0, self._record(slot)) for slot in given_back]
        return 0

    def _record(self, slot: Slot) -> Batch:
        return Batch([slot.value], [slot.key] if self._has_keys else None, [slot.request] if slot.request else None)

    def snapshot(self, number: int) -> tuple[object, int]:  # noqa: ARG002
        """Return the records in flight, each as its result if that is there, and else as it came."""
        held: list[tuple[bool, object, object]] = []
        for slot in self._order if self._is_ordered else self._unordered:
            has_result = slot.is_done and slot.error is None and not slot.is_given_back
            held.append((has_result, slot.result if has_result else slot.value, slot.key))
        waiting = sum(not has_result for has_result, _, _ in held)
        return (self._has_keys, held) if held else None, -waiting

    def recover(self) -> None:
        """Hand results on that were there, and call the function for the other records."""
        assert self.recovery is not None
        if self.recovery.state is None:
            return
        self._has_keys, held = self.recovery.state
        slots: list[Slot] = []
        for has_result, value, key in held:
            slot = Slot(None if has_result else value, key, None)
            slot.result, slot.is_done = value if has_result else None, has_result
            slots.append(slot)
        done = [slot for slot in slots if slot.is_done]
        self._started += len(done)  # as they are handed on, too
        self._add(slots)
        if not self._is_ordered:
            self._done.extend(done)
        self._surroundings.post(self._poked)

    @property
    def calls_running(self) -> int:
        return len(self._running)

    def where(self) -> str:
        slots = [(slot, slot.task) for slot in tuple(self._running)]
        return "".join(
            f"record {short(slot.value)}:\n{_where(task, self._thread_id)}" for slot, task in slots if task is not None
        )

    def _batch_of(self, done: list[Slot]) -> Batch:
        """Apply the policy to failed records, and return the other results with their keys and requests."""
        kept: list[Slot] = []
        for slot in done:
            if slot.is_given_back:
                self.leave(self._record(slot))
                continue
            if slot.error is not None:
                self.began_at = slot.began_at
                if not self.give_up(self._record(slot), 0, slot.error, slot.attempts):
                    break
            elif not (self._drops_none and slot.result is None):
                kept.append(slot)
            elif slot.request is not None:
                slot.request.drop()
            self.metrics.records_in += 1
        return Batch(
            [slot.result for slot in kept],
            [slot.key for slot in kept] if self._has_keys else None,
            [slot.request for slot in kept] if self._has_requests else None,
        )

    # --- on the loop ---

    def _poked(self) -> None:
        self._is_posted = False
        self._thread_id = threading.get_ident()
        self._start_more()

    def _start_more(self) -> None:
        """Start calls while there are records and places."""
        import asyncio

        running, waiting = self._running, self._waiting
        if self._full_at is not None:
            self.metrics.full_s += self._surroundings.now() - self._full_at
            self._full_at = None
        create_task = asyncio.get_running_loop().create_task
        # A task that is stuck is told of the end, but does not come to drop anything.
        while waiting and len(running) < self.concurrency and not (self._begins_nothing or self.span.cancelled):
            if self._has_too_many():
                # Said before it is looked at again, so that the task, which looks the other way round, misses nothing.
                self._is_full = True
                if self._has_too_many():
                    return
            try:
                slot = waiting.popleft()
            except IndexError:  # the task has just taken it back
                return
            self._started += 1
            slot.is_measured = self._started <= self.concurrency or self._started % MEASURED_EVERY == 0
            around = self._around.copy()  # and not that of the record whose end made room
            if self._has_keys:
                around.run(key_here.set, slot.key)
            running.add(slot)
            slot.task = create_task(self._attend(slot), context=around)
        if len(running) >= self.concurrency:
            self._full_at = self._surroundings.now()

    @property
    def _begins_nothing(self) -> bool:
        return self._is_dropped or self._is_held_back

    def _has_too_many(self) -> bool:
        return self._started - self._handed_on >= 2 * self.concurrency

    async def _attend(self, slot: Slot) -> None:
        """Call the function until there is a result or no attempt is left."""
        if slot.is_measured:
            self.costs.begins()
        began_at = self._surroundings.now() if slot.is_measured else None
        try:
            await self._try(slot)
        except BaseException as error:  # the policy of the operator decides, on the thread of the task
            if not slot.is_given_back:
                slot.error = error
        if began_at is not None:
            self.costs.measured(1, self._surroundings.now() - began_at)
        self._running.discard(slot)
        slot.is_done = True
        slot.task = None
        if self._is_dropped:
            self._end_if_over()
            return
        if not self._is_ordered:
            self._done.append(slot)
        if not self._is_rung and self._can_go_on():
            self._is_rung = True
            self.wake()
        self._start_more()

    async def _try(self, slot: Slot) -> None:
        import asyncio

        while True:
            if self._is_held_back:
                slot.is_given_back = True
                return
            slot.attempts += 1
            slot.began_at = time()
            try:
                slot.result = await (self._call(slot.value) if self._timeout_s is None else self._in_time(slot.value))
                return
            except Exception as error:
                pause_s = self.pause_s(error, slot.attempts)
                if pause_s is None or self._is_dropped:
                    raise
            slot.is_pausing = True
            if not self._is_held_back:
                await asyncio.sleep(pause_s)
            slot.is_pausing = False

    def _end_pauses(self) -> None:
        """Give back the records that wait for another attempt."""
        for slot in tuple(self._running):
            if slot.is_pausing and slot.task is not None:
                slot.is_given_back = True
                slot.task.cancel()

    async def _in_time(self, value: object) -> object:
        import asyncio

        assert self._timeout_s is not None
        bound = asyncio.timeout(self._timeout_s)
        try:
            async with bound:
                return await self._call(value)
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise TimeoutError(f"no result within {self._timeout_s:g} s") from error

    def _can_go_on(self) -> bool:
        """Return whether the task would find anything to hand on."""
        if not self._is_ordered:
            return True
        try:
            return self._order[0].is_done
        except IndexError:  # it has just been there
            return False

    def _cancel(self) -> None:
        self._is_cancelled = True
        for slot in tuple(self._running):
            assert slot.task is not None
            slot.task.cancel()
            if not slot.attempts:
                self._running.discard(slot)  # it never begins
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._is_cancelled and not self._running:
            self._waiting.clear()
            self._order.clear()
            self._done.clear()
            self.is_quiet = True
            self.wake()


def _where(task: asyncio.Task[None], thread_id: int) -> str:
    """Return the stack of a coroutine that waits or blocks the thread of its loop, from the user's function on."""
    awaited: Any = task.get_coro()
    if awaited.cr_running:
        stack = traceback.extract_stack(sys._current_frames().get(thread_id))
    else:
        frames = []
        while getattr(awaited, "cr_frame", None) is not None:
            frames.append((awaited.cr_frame, awaited.cr_frame.f_lineno))
            awaited = awaited.cr_await
        stack = traceback.StackSummary.extract(iter(frames))
    own = max((place for place, entry in enumerate(stack) if entry.filename == __file__), default=-1)
    return "".join(traceback.format_list(stack[own + 1 :]))
