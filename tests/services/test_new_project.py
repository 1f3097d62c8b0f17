"""`sage new` makes projects that run, and whose own tests pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rag.filled import is_filled
from support.vector_stores import wait_for

from sage._control.cli import main

ROOT = Path(__file__).resolve().parents[2]

FILES = [
    *(".gitignore", "README.md", "config.toml", "docs/welcome.md", "pipeline.py", "pyproject.toml", "questions.txt"),
    *("tests/questions.jsonl", "tests/test_pipeline.py"),
]


def new(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["new", *args])
    return result.exit_code, result.output


def environment() -> dict[str, str]:
    """Return an environment without the options that these tests are run with."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAGE_", "PYTEST_"))}
    return {**kept, "PYTHONPATH": str(ROOT / "src")}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *command],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "shop-guide"
    code, output = new("rag", str(folder))
    assert code == 0, output
    assert output.splitlines()[-2] == f"Next: cd {folder}, python pipeline.py, python -m pytest"
    assert 'pip install "sage-dataflow[rag]"' in output.splitlines()[-1]
    return folder


AGENT_FILES = [
    *(".gitignore", "README.md", "agent.py", "config.toml", "pyproject.toml", "questions.txt", "stand_in.py"),
    *("tests/test_agent.py", "tools.py"),
]


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    folder = tmp_path / "shop-agent"
    code, output = new("agent", str(folder))
    assert code == 0, output
    assert output.splitlines()[-1] == f"Next: cd {folder}, python agent.py, python -m pytest"
    return folder


@pytest.mark.timeout(120)
def test_the_tests_of_a_new_agent_pass(agent: Path) -> None:
    made = sorted(str(path.relative_to(agent)) for path in agent.rglob("*") if path.is_file())
    assert made == AGENT_FILES
    ended = run(agent, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout
    assert "11 passed" in ended.stdout


def test_a_new_agent_answers(agent: Path, server: str) -> None:
    ended = run(agent, "agent.py")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "What is the stock of rope?\n  12\nWhat is the price of a lamp?\n  20.0\n"
    config = (agent / "config.toml").read_text("utf-8")
    for before, after in (
        ('llm = "stand-in"', 'llm = "openai"'),
        ("https://api.openai.com/v1", f"{server}/open/v1"),
        ("OPENAI_API_KEY", ""),
        ("gpt-4o-mini", "agent/new"),
    ):
        config = config.replace(before, after)
    (agent / "config.toml").write_text(config, "utf-8")
    ended = run(agent, "agent.py")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[1::2] == ["  I found 5.0.", "  I found 20.0."]


@pytest.mark.timeout(120)
def test_the_tests_of_a_new_project_pass(project: Path) -> None:
    made = sorted(str(path.relative_to(project)) for path in project.rglob("*") if path.is_file())
    assert made == FILES
    ended = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout
    assert "12 passed" in ended.stdout
    assert not (project / "index").exists()


def test_a_new_project_needs_no_extras(project: Path) -> None:
    """Two commands after a bare install give answers: nothing of another library is imported."""
    libraries = ["numpy", "openai", "tokenizers", "safetensors", "lxml", "pypdfium2", "yaml"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({libraries}))"
    program = f"{blocked}\nimport runpy\nrunpy.run_path('pipeline.py', run_name='__main__')"
    ended = run(project, "-c", program)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("3 passages\n\nWhere do I put my documents?\n")


@pytest.mark.parametrize("embeddings", ["none", "hashing"])
def test_a_new_project_answers(project: Path, embeddings: str) -> None:
    config = (project / "config.toml").read_text("utf-8")
    (project / "config.toml").write_text(config.replace('embeddings = "none"', f'embeddings = "{embeddings}"'), "utf-8")
    assert "# Welcome to shop-guide\n" in (project / "docs" / "welcome.md").read_text("utf-8")
    for _ in range(2):
        ended = run(project, "pipeline.py")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith("3 passages\n\nWhere do I put my documents?\n")
        assert "[1] welcome.md#documents" in ended.stdout


def test_a_new_project_tells_that_it_was_killed_while_it_indexed(project: Path) -> None:
    for number in range(200):
        (project / "docs" / f"more{number}.md").write_text(f"# Part {number}\n\nIt says {number}.\n" * 20, "utf-8")
    with subprocess.Popen([sys.executable, "pipeline.py"], cwd=project, env=environment()) as program:
        wait_for(lambda: is_filled(project / "index" / "words.db"), "a passage in the index")
        program.kill()
    for path in (project / "docs").glob("more*.md"):
        path.unlink()
    killed, ended = run(project, "pipeline.py"), run(project, "pipeline.py")
    assert (killed.returncode, ended.returncode) == (0, 0)
    assert "WARNING: file was not closed: what was being written then may be missing" in killed.stderr
    assert killed.stdout.startswith("3 passages\n\nWhere do I put my documents?\n")
    assert (ended.stdout, ended.stderr) == (killed.stdout, "")


TOOLS = [
    ["ruff", "check", "--isolated", "--no-cache", "--line-length=120", "--select=E,F,W,I,UP,B,SIM,RUF,PT", "."],
    ["ruff", "format", "--isolated", "--no-cache", "--line-length=120", "--check", "--diff", "."],
    pytest.param(["mypy", "--strict", "."], marks=pytest.mark.slow),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("made", ["project", "agent"])
def test_a_new_project_is_as_tidy_as_this_one(request: pytest.FixtureRequest, made: str, tool: list[str]) -> None:
    ended = run(request.getfixturevalue(made), "-m", *tool)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_nothing_is_overwritten(project: Path) -> None:
    (project / "config.toml").write_text("mine", "utf-8")
    code, output = new("rag", str(project))
    assert (code, output) == (
        1,
        f'Error: "{project}" is there already\nChoose another name, or an empty folder.\n',
    )
    assert (project / "config.toml").read_text("utf-8") == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert new("rag", str(tmp_path / "a"))[0] == 0


@pytest.mark.parametrize("name", ["-x", "1st", "no blanks", "dot."])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    code, output = new("rag", "--", str(tmp_path / name))
    assert code == 1
    assert f'"{name}" cannot be the name of a project' in output
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    code, output = new("rag", str(tmp_path / "file" / "project"))
    assert code == 1
    assert re.search(r'Error: ".*project" cannot be written: Not a directory', output)


def test_it_is_named_in_the_help() -> None:
    assert "Make the project NAME" in new("rag", "--help")[1]
