"""Descriptors that the program has closed, and whose numbers lead to its own files by now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sage import LocalEnvironment
from sage._descriptors import OpenFile


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def test_a_number_that_leads_to_another_file_is_left_alone(tmp_path: Path) -> None:
    ours = OpenFile(opened(tmp_path / "ours"))
    assert ours.write(b"one") == 3
    os.close(ours.descriptor)
    theirs = opened(tmp_path / "theirs")
    assert theirs == ours.descriptor
    assert not ours.is_open
    with pytest.raises(OSError, match="Bad file descriptor"):
        ours.write(b"two")
    ours.close()
    assert os.write(theirs, b"three") == 5
    os.close(theirs)
    assert (tmp_path / "ours").read_bytes() == b"one"
    assert (tmp_path / "theirs").read_bytes() == b"three"


def test_what_is_closed_stays_closed_when_the_same_file_is_opened_again(tmp_path: Path) -> None:
    first = OpenFile(opened(tmp_path / "file"))
    first.close()
    second = OpenFile(opened(tmp_path / "file"))
    assert second.descriptor == first.descriptor
    first.close()
    assert second.is_open
    second.close()


def test_a_report_is_not_written_into_a_file_of_the_program(tmp_path: Path) -> None:
    report, theirs = tmp_path / "report", tmp_path / "theirs"
    descriptors: list[int] = []

    def close_and_open(record: int) -> int:
        for name in os.listdir("/proc/self/fd"):
            try:
                is_report = os.path.samestat(os.stat(int(name)), os.stat(report))
            except OSError:
                continue  # that of the listing, which is closed
            if is_report:
                descriptor = opened(theirs)
                descriptors.append(os.dup2(descriptor, int(name)))
                os.close(descriptor)
        return record

    env = LocalEnvironment("closing", report_file=report)
    env.from_batch([1, 2]).map(close_and_open).sink(int)
    env.submit(autostop=True)
    os.write(descriptors[0], b"theirs")
    os.close(descriptors[0])
    assert theirs.read_bytes() == b"theirs"
    assert '"type": "report"' not in report.read_text(encoding="utf-8")
