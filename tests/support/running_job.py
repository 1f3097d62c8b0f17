"""A job that does nothing but run its services, for tests that need a server for longer than one test."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sage import StopSignal

if TYPE_CHECKING:
    from sage import LocalEnvironment


class RunningJob:
    """Runs the services of an environment until it is closed."""

    def __init__(self, env: LocalEnvironment) -> None:
        started, self._over = threading.Event(), threading.Event()

        def wait() -> StopSignal:
            started.set()
            self._over.wait()
            return StopSignal()

        env.from_source(wait).sink(lambda _: None)
        self._job = env.submit()
        assert started.wait(60.0)

    def close(self) -> None:
        """End the job."""
        self._over.set()
        self._job.wait()
