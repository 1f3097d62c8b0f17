"""What type checkers say of programs that use SAGE: nothing of right ones, and the mistake of each wrong line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.docs_pages import PAGES_WITH_CODE, ROOT, blocks_of

import sage
from sage._runtime.job import Job

# Nothing is kept of what was checked before, and some pages take the packages of all services.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
FOLDERS = [ROOT / "src", HERE, ROOT / "examples" / "rag"]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
RIGHT, WRONG = HERE / "right.py", HERE / "wrong.py"

MARK = re.compile(r"  # ([\w-]+), (report\w+)$")
# Pages show short functions without annotations, and one block after the other may use the same name.
LESS_STRICT = ["--check-untyped-defs", "--allow-redefinition", "--disable-error-code=var-annotated"]
LESS_STRICT += ["--disable-error-code=no-redef", "--disable-error-code=assignment"]
OF_OLD_PATHS = "upstream.md"
"""Its modules are made when they are imported, and type checkers cannot find them."""

WRONG_ON_PURPOSE = "paralellism"
"""What the page on errors misspells, to show what SAGE says of it."""

Findings = dict[int, set[str]]

needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None,
    reason="pyright comes with the packages of `make check` and `make test-services`",
)


def mypy(files: list[Path], folder: Path, *options: str) -> str:
    """Return what mypy finds, one finding a line."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--no-error-summary",
            "--hide-error-context",
            "--config-file=",
            *options,
            *files,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, FOLDERS)), "MYPY_CACHE_DIR": str(folder / "cache")},
    )
    assert done.returncode in (0, 1), done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if ": note: " not in line)


def pyright(files: list[Path], folder: Path, mode: str = "standard", **rules: str) -> list[tuple[str, int, str, str]]:
    """Return what pyright finds: file, line, rule and text."""
    settings = {
        "include": list(map(str, files)),
        "extraPaths": list(map(str, FOLDERS)),
        "typeCheckingMode": mode,
        **rules,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    words = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode in (0, 1), done.stderr or done.stdout
    return [
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1, one.get("rule", ""), one["message"])
        for one in json.loads(done.stdout)["generalDiagnostics"]
        if one["severity"] in ("error", "warning")
    ]


def expected(place: int) -> dict[int, str]:
    lines = WRONG.read_text(encoding="utf-8").splitlines()
    return {number: mark[place] for number, line in enumerate(lines, 1) if (mark := MARK.search(line))}


def compare(found: Findings, marked: dict[int, str]) -> None:
    """The lines are the same, and the mistake of each is among what was found there."""
    assert set(found) == set(marked)
    assert {number: rule for number, rule in marked.items() if rule not in found[number]} == {}


def test_mypy_finds_the_mistake_of_each_wrong_line(tmp_path: Path) -> None:
    found: Findings = {}
    for line in mypy([WRONG], tmp_path, "--strict").splitlines():
        name, number, rest = line.split(":", 2)
        assert name.endswith("wrong.py"), line
        found.setdefault(int(number), set()).add(rest.rpartition("[")[2].rstrip("]"))
    compare(found, expected(1))


@needs_pyright
def test_pyright_finds_the_mistake_of_each_wrong_line(tmp_path: Path) -> None:
    found: Findings = {}
    for _, number, rule, _ in pyright([WRONG], tmp_path):
        found.setdefault(number, set()).add(rule)
    compare(found, expected(2))


def test_mypy_finds_nothing_in_right_programs(tmp_path: Path) -> None:
    """`make check` has mypy read the examples."""
    assert mypy([RIGHT], tmp_path, "--strict") == ""


@needs_pyright
def test_pyright_finds_nothing_in_right_programs(tmp_path: Path) -> None:
    assert pyright([RIGHT], tmp_path, "strict") == []
    assert pyright(EXAMPLES, tmp_path) == []


def pages(folder: Path) -> list[Path]:
    """Write the code blocks of each page as one program, each line where it stands on the page."""
    files = []
    for page in PAGES_WITH_CODE:
        if page.name == OF_OLD_PATHS:
            continue
        lines: list[str] = []
        for block in blocks_of(page):
            lines += [""] * (block.line - len(lines)) + block.code.splitlines()
        files.append(folder / f"{page.stem.replace('-', '_')}_page.py")
        files[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def line_of(files: list[Path], name: str, number: int | str) -> str:
    (file,) = (file for file in files if file.name == name)
    return file.read_text(encoding="utf-8").splitlines()[int(number) - 1]


def test_the_code_of_the_pages_is_right(tmp_path: Path) -> None:
    programs = pages(tmp_path)
    found = mypy(programs, tmp_path, *LESS_STRICT).splitlines()
    assert [line for line in found if WRONG_ON_PURPOSE not in line_of(programs, *line.split(":")[:2])] == []
    assert len(found) == 1


@needs_pyright
def test_the_code_of_the_pages_is_right_for_pyright_too(tmp_path: Path) -> None:
    programs = pages(tmp_path)
    found = pyright(programs, tmp_path, reportRedeclaration="none")
    assert [one for one in found if WRONG_ON_PURPOSE not in line_of(programs, one[0], one[1])] == []
    assert found != []


def test_nothing_private_is_completed_on_a_job() -> None:
    public = [name for name in dir(Job) if not name.startswith("_")]
    assert public == ["cancel", "events", "is_running", "operators", "plan", "report", "state", "stop", "wait"]


def test_a_report_is_there_while_the_job_runs() -> None:
    env = sage.LocalEnvironment("live")
    counter = env.register_service("counter", lambda: None)
    env.from_source(lambda: None).map(lambda record: record, name="idle").sink(print)
    job = env.submit()
    try:
        report = job.report
        assert report.state is sage.Outcome.RUNNING
        assert [service.name for service in report.services] == ["counter"]
        assert str(report).startswith('job "live": RUNNING after ')
        assert report.operator("idle").records_in == 0
        assert sage.JobReport.from_dict(report.to_dict()).state is sage.Outcome.RUNNING
    finally:
        job.stop()
    assert job.report.state is sage.Outcome.STOPPED
    assert counter is not None
