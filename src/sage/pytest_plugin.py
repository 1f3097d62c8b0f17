"""The pytest plugin: fails a test that leaves something behind. It loads nothing of SAGE before a test asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

IGNORED = "temporary folder */pytest-of-*"
"""The folder that pytest itself keeps for `tmp_path`."""


class Everywhere:
    """Runs every test with the fixture, where the option asks for that."""

    @pytest.fixture(autouse=True)
    def _sage_clean_everywhere(self, request: pytest.FixtureRequest) -> None:
        """Ask for the fixture."""
        request.getfixturevalue("sage_clean")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the configuration file."""
    parser.addini("sage_clean", "fail every test that leaves threads, processes, files ... behind", "bool", False)
    parser.addini("sage_clean_within_s", "how long things may take to end after a test, in seconds", "string", "2.0")
    parser.addini("sage_clean_ignore", "patterns of what tests may leave behind", "linelist", [])


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and switch the check on for all tests if the option says so."""
    config.addinivalue_line(
        "markers",
        "sage_clean(within_s=..., ignore=...): fail the test if it leaves anything behind that does not end within_s",
    )
    if config.getini("sage_clean"):
        config.pluginmanager.register(Everywhere(), "sage_clean_everywhere")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Have tests that carry the marker use the fixture."""
    if not isinstance(obj, type) and collector.istestfunction(obj, name):
        marks = getattr(obj, "pytestmark", None)
        own = [mark.name for mark in marks] if isinstance(marks, list) else []
        if "sage_clean" in own or collector.get_closest_marker("sage_clean"):
            pytest.mark.usefixtures("sage_clean")(obj)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a marker that has come too late for the fixture, rather than not to watch the test.

    Raises:
        UsageError: the marker belongs to one set of parameters, or to a test of unittest.
    """
    if item.get_closest_marker("sage_clean"):
        fixtures: list[str] = getattr(item, "fixturenames", [])
        if not {"sage_clean", "_sage_clean_everywhere"} & {*fixtures}:
            raise pytest.UsageError(
                f"{item.nodeid}: the marker sage_clean does not work here; "
                'use @pytest.mark.usefixtures("sage_clean") on the function or class'
            )


@pytest.fixture
def sage_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if it leaves anything behind; see `sage.testing.assert_clean`."""
    from sage.testing import assert_clean

    marker = request.node.get_closest_marker("sage_clean")
    settings = {"within_s": float(request.config.getini("sage_clean_within_s")), **(marker.kwargs if marker else {})}
    ignore = settings.pop("ignore", ())
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    patterns += [IGNORED, *request.config.getini("sage_clean_ignore")]
    try:
        with assert_clean(ignore=patterns, **settings):
            yield
    except AssertionError as error:
        # No line of this file says anything about the test.
        pytest.fail(str(error), pytrace=False)
