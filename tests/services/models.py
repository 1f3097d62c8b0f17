"""What tests of models share: the key that the server of the tests takes, and models that are used without a job."""

from __future__ import annotations

import base64
import json
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


def saying(*pieces: str, status: int = 200, **headers: str) -> str:
    """Return the name of a model that the server of the tests answers for with these pieces of a body."""
    said = {"status": status, "headers": headers, "pieces": pieces}
    return f"say/{base64.urlsafe_b64encode(json.dumps(said).encode()).decode()}"
