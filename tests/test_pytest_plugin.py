"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEAKS = """
import os, sys, threading, time, unittest
import pytest

def leak(name="left.txt"):
    return os.open(name, os.O_CREAT)

"""


def outcomes(
    folder: Path, tests: str, *arguments: str, ini: str = "sage_clean_within_s = 0.01", installed: bool = False
) -> tuple[dict[str, list[str]], str]:
    """Run pytest in a folder of its own and return the outcomes by test, as they came, and what it printed."""
    (folder / "pytest.ini").write_text(f"[pytest]\naddopts = --strict-config --strict-markers\n{ini}")
    (folder / "test_them.py").write_text(LEAKS + tests)
    (folder / "temporary").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment.update(PYTHONPATH=os.pathsep.join([str(folder), str(ROOT / "src")]), TMPDIR=str(folder / "temporary"))
    if not installed:
        # All the plugins that are installed here take seconds to load.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    found: dict[str, list[str]] = {}
    for name, outcome in re.findall(r"^test_them\.py::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", done.stdout, re.MULTILINE):
        found.setdefault(name, []).append(outcome)
    assert found or done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    return found, done.stdout + done.stderr


LOADED = ("-p", "sage.pytest_plugin")
PASSED = ["PASSED"]
LEFT = ["PASSED", "ERROR"]
"""What is left is an error beside the outcome of the test itself."""


def test_the_fixture_fails_a_test_that_leaves_something(tmp_path: Path) -> None:
    tests = """
def test_leaks(sage_clean):
    leak()

def test_is_clean(sage_clean, tmp_path):
    threading.Thread(target=time.sleep, args=(0.1,)).start()
    os.close(leak())

def test_is_not_watched():
    leak()
"""
    found, output = outcomes(tmp_path, tests, *LOADED, ini="")
    assert found == {"test_leaks": LEFT, "test_is_clean": PASSED, "test_is_not_watched": PASSED}
    path = re.escape(str(tmp_path / "left.txt"))
    assert re.search(rf"^left behind after 2 s:\n  file descriptor \d+ -> {path}$", output, re.MULTILINE)


def test_the_marker_asks_for_the_fixture(tmp_path: Path) -> None:
    """On a function, a method and a class, and with settings; those of the closest marker count."""
    tests = """
@pytest.mark.sage_clean
def test_leaks():
    leak()

@pytest.mark.sage_clean(within_s=0.0)
@pytest.mark.parametrize("seconds", [0.5])
def test_has_no_time(seconds):
    threading.Thread(target=time.sleep, args=(seconds,), name="late").start()

@pytest.mark.sage_clean(ignore="*/left.txt")
def test_may_leak():
    leak()

@pytest.mark.sage_clean(ignore=["nothing", "*/left.txt"])
class TestThose:
    def test_may_leak(self):
        leak()

    @pytest.mark.sage_clean(within_s=0.02)
    def test_leaks(self):
        leak()

    @staticmethod
    def test_is_static():
        leak("other.txt")

def test_is_not_watched():
    leak()
"""
    found, output = outcomes(tmp_path, tests, *LOADED)
    assert found == {
        "test_leaks": LEFT,
        "test_has_no_time[0.5]": LEFT,
        "test_may_leak": PASSED,
        "TestThose::test_may_leak": PASSED,
        "TestThose::test_leaks": LEFT,
        "TestThose::test_is_static": LEFT,
        "test_is_not_watched": PASSED,
    }
    assert 'left behind after 0 s:\n  thread "late", at ' in output
    assert "left behind after 0.02 s" in output


@pytest.mark.parametrize(
    "marked",
    [
        "class Those(unittest.TestCase):\n    @pytest.mark.sage_clean\n    def test_it(self): pass",
        '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.sage_clean)])\ndef test_it(n): pass',
    ],
    ids=["unittest", "parameters"],
)
def test_a_marker_that_cannot_work_is_refused(tmp_path: Path, marked: str) -> None:
    found, output = outcomes(tmp_path, f"{marked}\n", *LOADED)
    assert found == {}
    assert 'the marker sage_clean does not work here; use @pytest.mark.usefixtures("sage_clean")' in output


def test_the_option_switches_it_on_for_all_tests(tmp_path: Path) -> None:
    """Also for methods of unittest; what a fixture of a wider scope opens may stay."""
    tests = """
@pytest.fixture(scope="module")
def opened_for_all():
    leak()

@pytest.fixture
def opened_for_one():
    number = leak()
    yield
    os.close(number)

@pytest.fixture
def opened_for_ever():
    leak()

def test_leaks():
    leak()

def test_is_clean(opened_for_all, opened_for_one):
    pass

def test_has_a_fixture_that_leaks(opened_for_ever):
    pass

@pytest.mark.sage_clean(ignore="*")
def test_is_left_out():
    leak()

class Those(unittest.TestCase):
    def test_leaks(self):
        leak()
"""
    found, _ = outcomes(tmp_path, tests, *LOADED, ini="sage_clean = true\nsage_clean_within_s = 0.01")
    assert found == {
        "test_leaks": LEFT,
        "test_is_clean": PASSED,
        "test_has_a_fixture_that_leaks": LEFT,
        "test_is_left_out": PASSED,
        "Those::test_leaks": LEFT,
    }


def test_the_option_says_what_may_stay(tmp_path: Path) -> None:
    """Beside what the marker of a test says."""
    tests = """
@pytest.mark.sage_clean(ignore="*/other.txt")
def test_may_leak():
    leak("left.txt")
    leak("other.txt")

def test_leaks():
    leak("other.txt")
"""
    ini = "sage_clean = true\nsage_clean_within_s = 0.01\nsage_clean_ignore =\n    nothing\n    */left.txt"
    found, _ = outcomes(tmp_path, tests, *LOADED, ini=ini)
    assert found == {"test_may_leak": PASSED, "test_leaks": LEFT}


def test_a_run_that_does_not_use_it_loads_nothing_of_sage(tmp_path: Path) -> None:
    tests = """
def test_what_is_loaded():
    loaded = {name for name in sys.modules if name.partition(".")[0] == "sage"}
    assert loaded == {"sage", "sage._lazy", "sage._old_paths", "sage.pytest_plugin"}

def test_what_is_set_up(request):
    assert request.fixturenames == ["request"]
"""
    found, _ = outcomes(tmp_path, tests, *LOADED)
    assert found == {"test_what_is_loaded": PASSED, "test_what_is_set_up": PASSED}


@pytest.mark.parametrize("arguments", [(), LOADED], ids=["entry point", "entry point and -p"])
def test_the_entry_point_loads_it_once(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The metadata are those of pyproject.toml, as an installation would have them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["pytest11"].items()
    folder = tmp_path / "sage_as_installed-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sage-as-installed\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[pytest11]\n{name} = {value}\n")
    (tmp_path / "conftest.py").write_text(f'pytest_plugins = ["{value}"]\n')
    tests = """
def test_leaks(sage_clean):
    leak()
"""
    found, _ = outcomes(tmp_path, tests, *arguments, installed=True)
    assert found == {"test_leaks": LEFT}
