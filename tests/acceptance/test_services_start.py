"""Starts of services that go wrong: no record flows, and what was built is cleaned."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Literal

import pytest
from support.recording_services import Broken, Notes, Recorded, assert_same, report_of

from sage import (
    Cleanliness,
    GraphError,
    LocalEnvironment,
    Outcome,
    ServiceOptions,
    ServiceStartError,
    UnknownServiceError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.fair_clock import FairClock

    from sage._runtime.backend import Backend

    MakeBackend = Callable[[], Backend]
    Host = Literal["inline", "process"]

PROMPTLY_S = {"inline": 0.5, "process": 6.0, "ray": 30.0}
"""How long the start and the end of four services may take, one after the other, on a slow machine.

Each process of Ray imports Ray; the bound is half of the one of a start, which nothing of this has to wait for.
"""


# --- starts that go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["build", "setup", "start"])
@pytest.mark.parametrize("chained", [True, False])
def test_a_start_that_raises_is_unwound(
    backend: MakeBackend, host: Host, journal: Notes, hook: str, chained: bool, clock: FairClock
) -> None:
    """The third of four services fails; what was built is cleaned, and no record flows."""
    records = list[int]()
    cause = OSError("no such model")
    env = LocalEnvironment(backend=backend)
    for place, name in enumerate("abcd"):
        options = ServiceOptions(host=host, depends_on=["abcd"[place - 1]] if chained and place else [])
        if name == "c":
            env.register_service(name, Broken, journal, hook, cause, options=options)
        else:
            env.register_service(name, Recorded, journal, options=options)

    def read() -> Iterator[int]:
        records.append(1)
        yield 1

    env.from_batch(read).sink(records.append)
    began_at = time.monotonic()
    with pytest.raises(ServiceStartError, match='service "c" failed') as caught:
        env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < PROMPTLY_S[host]
    assert_same(caught.value.__cause__, cause, host)
    assert caught.value.service == "c"
    assert records == []
    built = {entry[0] for entry in journal if ".build" in entry} - ({"c"} if hook == "build" else set())
    cleaned = [entry[0] for entry in journal if ".cleanup" in entry]
    assert Counter(cleaned) == Counter(built)
    if chained:
        assert "d.build" not in journal
        assert cleaned == (["b", "a"] if hook == "build" else ["c", "b", "a"])
        assert report_of(env).service("d").state == "skipped"
    assert "c.stop" not in journal
    assert report_of(env).service("c").state == "failed_start"
    assert (report_of(env).state, report_of(env).cleanliness) == (Outcome.FAILED, Cleanliness.CLEAN)


def test_a_service_that_never_gets_ready(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """The start ends at its bound, and what was started is unwound."""
    records = list[int]()

    class Never(Recorded):
        def ready(self) -> bool:
            return False

    env = LocalEnvironment(backend=backend)
    env.register_service("a", Recorded, journal, options=ServiceOptions(host=host))
    start_s = {"inline": 0.2, "process": 3.0}.get(host, 8.0)  # on Ray, its process has to be there before
    env.register_service("b", Never, journal, options=ServiceOptions(host=host, start_timeout_s=start_s))
    env.from_batch([1]).sink(records.append)
    with pytest.raises(ServiceStartError, match='service "b" did not end its ready in time'):
        env.submit(autostop=True)
    assert records == []
    assert Counter(entry for entry in journal if ".cleanup" in entry) == Counter(["a.cleanup", "b.cleanup"])
    assert report_of(env).service("b").state == "failed_start"
    assert report_of(env).state is Outcome.FAILED


def test_services_that_require_each_other_are_refused(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """A cycle or an unknown name is an error of the program, before anything is built."""
    env = LocalEnvironment(backend=backend)
    env.register_service("a", Recorded, journal, options=ServiceOptions(host=host, depends_on=["b"]))
    env.register_service("b", Recorded, journal, options=ServiceOptions(host=host, depends_on=["a"]))
    env.from_batch([1]).sink(lambda data: None)
    with pytest.raises(GraphError, match=r"a.*b|b.*a"):
        env.submit(autostop=True)

    other = LocalEnvironment(backend=backend)
    other.register_service("a", Recorded, journal, options=ServiceOptions(host=host, depends_on=["nobody"]))
    other.from_batch([1]).sink(lambda data: None)
    with pytest.raises(UnknownServiceError, match="nobody"):
        other.submit(autostop=True)
    assert journal == []
