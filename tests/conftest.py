"""Fixtures and options that all tests share.

`python tests/mutants.py` shows that the tests notice mistakes in the sources.
"""

from __future__ import annotations

import gc
import signal
from typing import TYPE_CHECKING

import hypothesis
import pytest
from support.fair_clock import FairClock
from support.private_temporary import _private_temporary  # noqa: F401 - pytest finds it here
from support.recording_services import Notes

from sage._backends.threads import ThreadsBackend
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sage._runtime.backend import Backend


# The entry point of an installed SAGE names the same module, and then it is loaded once all the same.
pytest_plugins = ["sage.pytest_plugin"]

# A shell that starts the tests in the background, or nohup, has them ignore these, and what they start inherits that.
for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, signal.default_int_handler if signum is signal.SIGINT else signal.SIG_DFL)

# What an example takes says more about the machine than about the code; each test has a bound of its own.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.register_profile("few", deadline=None, max_examples=25)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `--seeds N` run every test of the step backend with N seeds, and `--moments N` hit N moments of a program."""
    parser.addoption("--proof", action="store_true", help="run also the tests marked as proof, and all cases of each")
    parser.addoption(
        "--few", action="store_true", help="run so few cases of a test that each value of a parameter comes"
    )
    parser.addoption("--seeds", type=int, default=2, help="how many seeds the step backend is run with")
    parser.addoption("--moments", type=int, default=4, help="how many moments of a phase drivers are killed at")
    parser.addoption("--kills", type=int, default=30, help="how many drivers of `sage exec` the proof kills")
    parser.addoption("--simulation-base", type=int, default=0, help="the first seed of the simulation")
    parser.addoption("--simulation-count", type=int, default=400, help="how many seeds the simulation runs")
    parser.addoption("--simulation-seed", type=int, help="the only seed that the simulation runs")


def pytest_configure(config: pytest.Config) -> None:
    """Let Hypothesis draw fewer examples where few cases are asked for."""
    if config.getoption("--few") and not config.getoption("--proof"):
        hypothesis.settings.load_profile("few")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, and what needs Ray, unless it is asked for."""
    left_out = set() if config.getoption("--proof") else {"proof"}
    if "ray" not in config.getoption("markexpr"):
        left_out.add("ray")
    deselected = [item for item in items if any(item.get_closest_marker(name) is not None for name in left_out)]
    if config.getoption("--few") and not config.getoption("--proof"):
        deselected += set(items) - set(deselected) - each_value_once(items)
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in set(deselected)]


def each_value_once(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return so many cases of each test that each value of each of its parameters comes at least once.

    Of a test of four errors in two hooks on four backends, these are four cases of thirty-two.
    """
    tests: dict[str, dict[pytest.Item, set[tuple[int, str]]]] = {}
    for item in items:
        # Rows of one table have one name each; the indices of pytest itself number the whole product.
        names = item.callspec._idlist if isinstance(item, pytest.Function) and hasattr(item, "callspec") else [""]
        tests.setdefault(item.nodeid.partition("[")[0], {})[item] = set(enumerate(names))
    kept: set[pytest.Item] = set()
    for cases in tests.values():
        missing = set().union(*cases.values())
        while missing:
            best = max(cases, key=lambda case: len(cases[case] & missing))
            kept.add(best)
            missing -= cases[best]
    return kept


def pytest_collection_finish() -> None:
    """Keep what pytest has collected out of the garbage collector.

    With thousands of items, one run of it took up to two seconds, in which every thread of a job stood still.
    """
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes `backend` on threads and on the step backend with each seed.

    One that takes `host`, and does not say which, runs with its services in this process, and on threads also with each
    in its own: the step backend has a clock of its own, which processes do not follow. On Ray, services are there too.
    """
    backends = ["threads", *(f"step-{seed}" for seed in range(metafunc.config.getoption("--seeds")))]
    pairs = [*((backend, "inline") for backend in backends), ("threads", "process")]
    if metafunc.definition.get_closest_marker("ray") is not None:
        backends, pairs = ["ray"], [("ray", "ray")]
    own = " ".join(str(marker.args[0]) for marker in metafunc.definition.iter_markers("parametrize"))
    match "backend" in metafunc.fixturenames, "host" in metafunc.fixturenames and "host" not in own:
        case True, False:
            metafunc.parametrize("backend", backends, indirect=True)
        case True, True:
            metafunc.parametrize(("backend", "host"), pairs, indirect=["backend"])
        case False, True:
            metafunc.parametrize("host", ["ray"] if backends == ["ray"] else ["inline", "process"])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Callable[[], Backend]:
    """Return what makes the backend of one job, for `LocalEnvironment(backend=...)`."""
    name: str = request.param
    if name in ("threads", "ray"):  # a remote environment does not ask for it
        return ThreadsBackend
    seed = int(name.removeprefix("step-"))
    return lambda: StepBackend(seed)


@pytest.fixture
def journal(tmp_path: Path) -> Notes:
    """Return a list of lines that services of any process append to."""
    return Notes(tmp_path / "journal")


@pytest.fixture
def clock() -> Iterator[FairClock]:
    """Return a clock for upper bounds on real time, which leaves out what the machine took."""
    with FairClock() as fair:
        yield fair
