"""Processes are found by the cookie in their environment."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sage._processes import COOKIE_VARIABLE, has_variable, process, stats, variable_of, with_cookie


def add_process(proc: Path, pid: int, environ: bytes) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "environ").write_bytes(environ)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_a_process_is_found_by_its_cookie() -> None:
    cookie = uuid.uuid4().hex
    program = "import sys\nsys.stdin.read()"
    command = [sys.executable, "-c", program, "a word"]
    environment = {**os.environ, COOKIE_VARIABLE: cookie}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as started:
        found = process(started.pid)
        assert with_cookie(cookie) == {found}
        assert variable_of(started.pid, COOKIE_VARIABLE) == cookie
        assert found not in with_cookie(uuid.uuid4().hex)
    assert with_cookie(cookie) == set()


def test_only_whole_variables_count(tmp_path: Path) -> None:
    add_process(tmp_path, 10, b"PATH=/bin\0SAGE_COOKIE=ab\0HOME=/")
    add_process(tmp_path, 11, b"SAGE_COOKIE=abc\0")
    add_process(tmp_path, 12, b"OLD_SAGE_COOKIE=ab\0SAGE_COOKIES=ab\0")
    add_process(tmp_path, 13, b"NOTE=SAGE_COOKIE=ab\0")
    cookies = [variable_of(pid, COOKIE_VARIABLE, tmp_path) for pid in (10, 11, 12, 13)]
    assert cookies == ["ab", "abc", None, None]
    assert [has_variable(pid, COOKIE_VARIABLE, tmp_path) for pid in (10, 11, 12, 13)] == [True, True, False, False]


def test_processes_that_vanish_or_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "11").mkdir()
    (tmp_path / "12" / "environ").mkdir(parents=True)
    (tmp_path / "13").mkdir()
    (tmp_path / "13" / "stat").write_bytes(b"13 (a b) c) S 1 13 13 0")
    (tmp_path / "self").mkdir()
    assert not any(has_variable(pid, COOKIE_VARIABLE, tmp_path) for pid in (11, 12, 13))
    assert list(stats(tmp_path)) == [(13, [b"S", b"1", b"13", b"13", b"0"])]


def test_a_platform_without_proc_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        list(stats(tmp_path / "nothing_here"))
