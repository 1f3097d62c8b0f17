"""What tests of models share: the key that the server of the tests takes, and models that are used without a job."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-right-0123456789"


@contextmanager
def opened(service: Any) -> Iterator[Any]:
    """Use a service as a program without a job does."""
    try:
        service.setup()
        yield service
    finally:
        getattr(service, "stop", lambda: None)()
        service.cleanup()
