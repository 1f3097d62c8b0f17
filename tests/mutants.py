"""Make one mistake after another in a copy of the sources, and see that a test notices each: `python tests/mutants.py`.

The mistakes are the table in `mutant_table.py`. Each runs the one test that it names, with a copy of `src` in which
the text of the edit is replaced; the checkout stays as it is. The exit code is 1 if a mistake passes unnoticed, or if
an edit or its test cannot be found any more. The plain run of the tests leaves it out, as it takes minutes.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"

TEST_BOUND_S = 60
"""How long pytest lets a test run; one that hangs has noticed the mistake, which the failure says."""

RUN_BOUND_S = 180
"""How long a run of one test may take, with the start of pytest."""

MARK = "SAGE_MUTANT"
"""A variable that every process of a run carries, so that what a mistake leaves running can be found and ended."""

FAILED, PASSED = 1, 0
"""Exit codes of pytest: a test has failed, and all have passed. The others say that nothing was run."""


def edited(mutant: Mutant, sources: Path = SOURCES) -> str:
    """Return the text of the mutant's file with its mistake.

    Raises:
        ValueError: the old text is not there exactly once, or the new one is not Python.
    """
    text = (sources / "sage" / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.name}: its old text is {found} times in {mutant.file}, not once")
    changed = text.replace(mutant.old, mutant.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise ValueError(f"{mutant.name}: {mutant.file} is not Python any more: {error}") from error
    return changed


def check_test(mutant: Mutant) -> None:
    """See that the test of a mutant exists.

    Raises:
        ValueError: the file or the function is missing.
    """
    file, *names = mutant.test.partition("[")[0].split("::")
    path = ROOT / file
    if not path.is_file():
        raise ValueError(f"{mutant.name}: {file} is missing")
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not found:
            raise ValueError(f"{mutant.name}: {name} is missing in {file}")
        body = found[0].body


def complaints(mutants: Iterable[Mutant]) -> Iterator[str]:
    """Yield what is wrong with the table: edits that do not apply, and tests that are not there."""
    names: set[str] = set()
    for mutant in mutants:
        if mutant.name in names:
            yield f"{mutant.name}: two mutants have this name"
        names.add(mutant.name)
        for check in (edited, check_test):
            try:
                check(mutant)
            except (ValueError, OSError) as error:
                yield str(error)


def run_tests(tests: Sequence[str], sources: Path, folder: Path) -> int | None:
    """Run tests with other sources, and return the exit code of pytest, or None if it did not end."""
    mark = uuid.uuid4().hex
    temporary = folder / "t"
    temporary.mkdir()
    environment = {
        **os.environ,
        MARK: mark,
        "PYTHONPATH": str(sources),
        "TMPDIR": str(temporary),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    options = ["-q", "-x", "-p", "no:cacheprovider", "--timeout", str(TEST_BOUND_S)]
    with open(folder / "output", "wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return running.wait(RUN_BOUND_S * len(tests))
        except subprocess.TimeoutExpired:
            return None
        finally:
            running.kill()
            running.wait()
            end_marked(f"{MARK}={mark}".encode())


def end_marked(variable: bytes) -> None:
    """Kill the processes that carry a variable: the mistake may be that somebody forgets to end them."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def outcome(mutant: Mutant) -> tuple[str, float]:
    """Return what came of a mutant, and how many seconds that took."""
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="m-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        sources = folder / "src"
        shutil.copytree(SOURCES, sources)
        place = sources / "sage" / mutant.file
        place.write_text(edited(mutant, sources), encoding="utf-8")
        with suppress(FileNotFoundError):
            os.unlink(importlib.util.cache_from_source(str(place)))
        code = run_tests([mutant.test], sources, folder)
        came = {FAILED: "caught", PASSED: "SURVIVED", None: "caught (hangs)"}.get(code, f"BROKEN (pytest exits {code})")
        if came.startswith("BROKEN"):
            print((folder / "output").read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
    return came, time.monotonic() - began_at


def passes_without(mutants: Sequence[Mutant]) -> bool:
    """Return whether the named tests pass on the sources as they are: otherwise their failures say nothing."""
    with tempfile.TemporaryDirectory(prefix="m-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        sources = folder / "src"
        shutil.copytree(SOURCES, sources)
        code = run_tests(list(dict.fromkeys(mutant.test for mutant in mutants)), sources, folder)
        if code != PASSED:
            print((folder / "output").read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
        return code == PASSED


def show(outcomes: Mapping[Mutant, tuple[str, float]]) -> None:
    """Print the table of what came of each mutant."""
    rows = [(one.name, one.file, one.test, came, f"{took_s:.1f}") for one, (came, took_s) in outcomes.items()]
    rows.insert(0, ("mutant", "file", "named test", "outcome", "seconds"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    """Run the mutants that the command line names, or all, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="run only the mutants with NAME in their names")
    parser.add_argument("-n", type=int, default=2, metavar="COUNT", help="how many to run at once (default: 2)")
    given = parser.parse_args()
    chosen = [one for one in MUTANTS if given.only is None or any(part in one.name for part in given.only)]
    wrong = list(complaints(chosen)) or ([] if chosen else ["no mutant has such a name"])
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if not passes_without(chosen):
        print("these tests do not pass on the sources as they are", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(given.n) as threads:
        outcomes = dict(zip(chosen, threads.map(outcome, chosen), strict=True))
    show(outcomes)
    noticed = sum(came.startswith("caught") for came, _ in outcomes.values())
    print(f"{noticed} of {len(outcomes)} mistakes were noticed")
    return 0 if noticed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
