"""The connection of this process to Ray."""

from __future__ import annotations

import secrets
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage.errors import UnsupportedPlanError, hint
from sage.services.extras import load

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.Lock()
_users: list[str] = []


@dataclass(frozen=True, slots=True)
class Connected:
    """What this process is connected to: host and port of the cluster, and the namespace of our actors there."""

    address: str
    namespace: str

    def ends_itself(self, job: str, timeout_s: float) -> str | None:  # noqa: ARG002
        """Return the file that the master of a job removes at its end, or None."""
        return None


@contextmanager
def cluster(address: str | None = None) -> Iterator[Connected]:
    """Keep this process connected to Ray as long as the block runs."""
    ray = load("ray", "ray")
    if address is None:
        error = UnsupportedPlanError("a Ray of this program's own cannot be started yet")
        raise hint(error, "Give the address of a cluster: RemoteEnvironment(address=...).")
    with _lock:
        if not ray.is_initialized():
            ray.init(address=address, namespace=f"sage-{secrets.token_hex(8)}", configure_logging=False)
            _users.clear()
            _users.append("ours")
        _users.append(address)
    try:
        yield Connected(address, ray.get_runtime_context().namespace)
    finally:
        with _lock:
            _users.pop()
            if _users == ["ours"]:
                _users.clear()
                ray.shutdown()
