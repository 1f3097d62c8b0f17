"""Calls of services that are awaited on an event loop of the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage._calls import CallFuture
from sage.errors import hint, short
from sage.service import DEFAULT_METHOD, ServiceHandle
from sage.serving import PipelineService, answered

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class AwaitedCalls:
    """Stands for a handle on a running event loop: each method of the service is called with `await`."""

    def __init__(self, handle: ServiceHandle[object]) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Callable[..., Coroutine[object, object, object]]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def call(*args: object, **kwargs: object) -> object:
            calls = self._handle._require()
            if name == DEFAULT_METHOD and self._handle._target is PipelineService:
                request, timeout_s = calls.method("begin")(*args, **kwargs)
                return await answered(request, timeout_s)
            future: CallFuture = calls.call_async(name, args, kwargs, None)
            return await future

        call.__name__ = name
        return call

    async def __call__(self, *args: object, **kwargs: object) -> object:
        """Call `process`."""
        return await getattr(self, DEFAULT_METHOD)(*args, **kwargs)


def aio(handle: object) -> Any:
    """Return the handle of a service as coroutines of your program can use it.

    Each method is awaited: `await aio(memory).recall(q)`. A direct call would block your event loop. Awaited calls go
    on side by side, as far as the `concurrency` of the service allows. With `env.serve(..., stream=True)`, `await`
    gives you an iterator for `async for`.

    Raises:
        TypeError: `handle` is not the handle of a service.
    """
    if not isinstance(handle, ServiceHandle):
        error = TypeError(f"aio({short(handle)}): {type(handle).__name__} is not the handle of a service")
        raise hint(error, "Give the handle that register_service(...), register_command(...) or serve(...) returned.")
    return AwaitedCalls(handle)
