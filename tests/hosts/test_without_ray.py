"""What a program sees that has no Ray: nothing, until it uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the standard library and SAGE, and nothing else."""
    whole = f"import sys\nsys.path.append({str(SOURCE)!r})\n{program}"
    return subprocess.run([sys.executable, "-I", "-S", "-c", whole], capture_output=True, text=True, timeout=30)


def test_an_import_needs_none() -> None:
    assert run("import sage._ray.connection, sage._ray.local_cluster, sage._ray.kept_cluster").returncode == 0


def test_its_use_names_the_extra() -> None:
    program = "from sage._ray.connection import cluster\nwith cluster({}): pass"
    for address in ("", "'auto'", "'warm'", "'10.0.0.5:6379'"):
        done = run(program.format(address))
        end = 'MissingExtraError: module "ray" is not installed\nInstall it with: pip install "sage-dataflow[ray]"\n'
        assert done.stderr.endswith(end)


def test_doctor_says_that_there_is_none() -> None:
    done = run("from sage._control import doctor\nprint(list(doctor.ray()))")
    assert "is_good=True, detail='not installed; RemoteEnvironment needs it" in done.stdout
    assert "sage-dataflow[ray]" in done.stdout
