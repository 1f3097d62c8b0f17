"""Sources that await: asynchronous generators, and coroutine functions that are called for each record."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from sage._operators.holding_source import HoldingSource
from sage.functions import StopSignal

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sage._operators.operator import OperatorContext

PAUSE_MIN_S = 0.001
PAUSE_MAX_S = 0.05
"""How long a coroutine function that gave None is left alone; the pause doubles while it does."""


class AwaitedSource(HoldingSource):
    """Asks coroutines for records on the job's event loop, and wakes its task when there are some.

    No more is asked for than the task wants to read. A stop cancels the coroutine where it awaits, so that its
    `finally` runs; its earlier records still go on.

    Args:
        give: returns an awaitable for the next record.
        surroundings: those of the operator.
        wake: makes the task step again.
        none_ends: whether None is the end, and not only nothing now.
        values: the asynchronous iterator behind `give`, whose None is data where `none_ends`, or None.
    """

    def __init__(
        self,
        give: Callable[[], Awaitable[object]],
        surroundings: OperatorContext,
        wake: Callable[[], None],
        *,
        none_ends: bool,
        values: AsyncIterator[object] | None = None,
    ) -> None:
        self._values = values
        self._close_values: Callable[[], Awaitable[object]] | None = getattr(values, "aclose", None)
        self._give = give
        self._surroundings = surroundings
        self._wake = wake
        self._none_ends = none_ends and values is None
        self._none_is_data = none_ends and values is not None
        # The loop adds at the end, and the task takes from the front.
        self._ready: deque[object] = deque()
        self._wanted = 0
        self._ended = False
        self._is_asked = False
        self._is_stopped = False
        self._was_asked = False
        self._has_begun = False
        self._pause_s = PAUSE_MIN_S
        self._task: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        return self._close_values is not None and getattr(self._values, "ag_frame", None) is None

    def read(self, records_max: int) -> list[object] | None:
        """Return records that are there, or ask for some."""
        is_over = self._ended or self.held_error is not None  # looked at first: a record may come before the end
        records: list[object] = []
        while self._ready and len(records) < records_max:
            records.append(self._ready.popleft())
        if records:
            return records
        if is_over:
            self.raise_held()
            return None
        if not self._is_asked and not self._is_stopped:
            self._is_asked = self._was_asked = True
            self._wanted = records_max
            self._surroundings.post(self._begin)
        return records

    def stop(self) -> bool:
        """Cancel the coroutine that runs, and return whether none runs any more, so that nothing more comes."""
        if not self._is_stopped:
            self._is_stopped = True
            if self._is_asked:
                self._surroundings.post(self._cancel)
        return not self._is_asked and not self._ready

    def close(self) -> None:
        """End the coroutine, and close the generator, so that its `finally` runs now."""
        if self._was_asked:
            self._surroundings.run_to_end(self._end())

    # --- on the loop ---

    def _begin(self) -> None:
        import asyncio

        self._task = asyncio.get_running_loop().create_task(self._give_some())

    def _cancel(self) -> None:
        # One that has not begun would end without a word; it looks by itself whether it was stopped.
        if self._task is not None and self._has_begun:
            self._task.cancel()

    async def _give_some(self) -> None:
        import asyncio

        self._has_begun = True
        try:
            while self._wanted > 0 and not self._is_stopped:
                record = await self._give()
                if isinstance(record, StopSignal) or (record is None and self._none_ends):
                    self._ended = True
                    return
                if record is None and not self._none_is_data:
                    await asyncio.sleep(self._pause_s)
                    self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
                    continue
                self._pause_s = PAUSE_MIN_S
                self._wanted -= 1
                self._ready.append(record)
                if len(self._ready) == 1:
                    self._wake()
        except StopAsyncIteration:
            self._ended = True
        except BaseException as error:  # the records before it go on first
            if not (self._is_stopped and isinstance(error, asyncio.CancelledError)):
                self.held_error = error
        finally:
            self._task = None
            self._has_begun = self._is_asked = False
            self._wake()

    async def _end(self) -> None:
        import asyncio

        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._close_values is not None:
            await self._close_values()
