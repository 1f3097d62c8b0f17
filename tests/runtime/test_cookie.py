"""Processes are found by the cookie in their environment."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sage._processes import COOKIE_VARIABLE
from sage._testing.cookie import processes_with


def add_process(proc: Path, pid: int, environ: bytes, cmdline: bytes = b"", comm: str = "idle") -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "environ").write_bytes(environ)
    (folder / "cmdline").write_bytes(cmdline)
    (folder / "comm").write_text(comm + "\n")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_a_process_is_found_by_its_cookie() -> None:
    cookie = uuid.uuid4().hex
    program = "import sys\nsys.stdin.read()"
    command = [sys.executable, "-c", program, "a word"]
    environment = {**os.environ, COOKIE_VARIABLE: cookie}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        expected = f"{sys.executable} -c import sys sys.stdin.read() a word"
        assert processes_with(cookie) == {process.pid: expected}
        assert processes_with(None)[process.pid] == expected
        assert process.pid not in processes_with(uuid.uuid4().hex)
    assert processes_with(cookie) == {}


def test_only_whole_variables_and_values_count(tmp_path: Path) -> None:
    add_process(tmp_path, 10, b"PATH=/bin\0SAGE_COOKIE=ab\0HOME=/", b"serve\0--all\0")
    add_process(tmp_path, 11, b"SAGE_COOKIE=abc\0")
    add_process(tmp_path, 12, b"OLD_SAGE_COOKIE=ab\0SAGE_COOKIES=ab\0", b"other\0")
    add_process(tmp_path, 13, b"NOTE=SAGE_COOKIE=ab\0", b"other\0")
    assert processes_with("ab", tmp_path) == {10: "serve --all"}
    assert processes_with(None, tmp_path) == {10: "serve --all", 11: "[idle]"}


def test_processes_that_vanish_or_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    add_process(tmp_path, 10, b"SAGE_COOKIE=ab\0", b"serve\0")
    (tmp_path / "11").mkdir()
    (tmp_path / "12" / "environ").mkdir(parents=True)
    (tmp_path / "13").mkdir()
    (tmp_path / "13" / "environ").write_bytes(b"SAGE_COOKIE=ab\0")
    (tmp_path / "self").mkdir()
    assert processes_with("ab", tmp_path) == {10: "serve"}


def test_a_platform_without_proc_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        processes_with("ab", tmp_path / "nothing_here")
