"""What an import brings with it, each in a fresh interpreter."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNNING = {"sage._backends.threads", "sage._guardian.job_journal", "sage._plan.planner", "sage._runtime.dispatcher"}
"""Modules that each bring in a part of what runs jobs."""


def modules_after(program: str) -> set[str]:
    """Return the modules that are loaded after a program."""
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "from sage import LocalEnvironment",
        "import sage; env = sage.LocalEnvironment(); env.register_service('n', dict); env.from_batch([1]).sink(print)",
        "import sage; env = sage.LocalEnvironment(); env.stop(); env.close()",
    ],
    ids=["import", "graph", "stop"],
)
def test_what_runs_jobs_is_not_loaded_before_a_submit(program: str) -> None:
    loaded = modules_after(program)
    assert "sage.environment" in loaded
    assert not loaded & (RUNNING | {"sage._runtime.lifecycle", "sage.observability", "sage.report"})


def test_what_runs_jobs_is_loaded_by_a_submit() -> None:
    """The names in the other test are the right ones."""
    program = "import sage\nenv = sage.LocalEnvironment()\nenv.from_batch([]).sink(id)\nenv.submit(True)"
    assert modules_after(program) > RUNNING


def test_the_process_of_a_service_starts_without_what_few_services_need() -> None:
    """Each start pays for it; a recorded service brings its cassette along."""
    loaded = modules_after("import sage._remote.process")
    assert not loaded & {"sage._cassette", "sqlite3", "hashlib", "pathlib", "asyncio", "cloudpickle"}


def test_sage_exec_starts_without_the_imports_of_other_commands() -> None:
    """Each command that it runs pays for them; neither does it say anything to a log."""
    loaded = modules_after("import sage._control.supervisor")
    assert not loaded & {"click", "dataclasses", "inspect", "logging", "sage._guardian.guardian", "sage.report"}


def test_the_package_alone_loads_none_of_its_parts() -> None:
    loaded = {name for name in modules_after("import sage") if name.startswith("sage.")}
    assert loaded == {"sage._lazy", "sage._old_paths"}


@pytest.mark.parametrize("package", ["sage.services", "sage.rag"])
def test_a_package_offers_its_public_names_and_loads_each_on_use(package: str) -> None:
    loaded = {name for name in modules_after(f"import {package}") if name.startswith(package)}
    assert loaded == {package}
    module = importlib.import_module(package)
    assert len(module.__all__) > 10
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        _ = module.Nothing


@pytest.mark.parametrize("package", ["services", "rag"])
def test_type_checkers_see_the_names_that_are_loaded(package: str) -> None:
    source = (Path(__file__).parents[1] / "src" / "sage" / package / "__init__.py").read_text(encoding="utf-8")
    seen = re.findall(rf"from sage\.?(?:{package}\.)?([\w.]*) import (\w+) as \2", source)
    listed = [
        (module.removeprefix("."), name)
        for module, names in re.findall(r'"([\w.]+)": "([\w ]+)"', source)
        for name in names.split()
    ]
    assert seen == listed
