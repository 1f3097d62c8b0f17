"""The journal: what is written before things are made, read by whoever takes over."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage._hosts.reaping import checked
from sage._runtime.journal import Journal, encode, make_private, read_lines, replay
from sage._runtime.processes import Process

A, B = {"job": "j1", "service": "a", "incarnation": 1}, {"job": "j1", "service": "b", "incarnation": 1}

ENTRIES: list[dict[str, Any]] = [
    {
        "entry": "run",
        "cookie": "c0",
        "pid": 7,
        "started": 70,
        "python": "python",
        "path": ["/x"],
        "folder": "/",
        "reports": "/r",
    },
    {"entry": "job", "job": "j1", "name": "demo", "report": None, "began_at": 1.5},
    {"entry": "service", **A, "host": "process", "requires": [], "token": "ta"},
    {"entry": "service", **B, "host": "process", "requires": ["a"], "token": "tb"},
    {"entry": "process", **A, "pid": 8, "started": 80, "stop_signal": None},
    {"entry": "claim", "job": "j1", "service": "a", "claim": "path", "path": "/dev/shm/segment"},
    {"entry": "claim", "job": "j1", "service": "a", "claim": "release", "pid": 9, "started": 90},
    {"entry": "state", "job": "j1", "service": "a", "state": "ready"},
    {"entry": "state", "job": "j1", "service": "b", "state": "stopped"},
    {"entry": "sealed", "job": "j1"},
]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for entry in ENTRIES:
        journal.write(encode(entry))
    journal.close()
    run = replay(read_lines(str(tmp_path)))
    job = run.jobs["j1"]
    a, b = job.services["a", 1], job.services["b", 1]
    assert (run.cookie, run.driver, run.unread_count) == ("c0", Process(7, 70), 0)
    assert (job.name, job.is_sealed, job.is_over) == ("demo", True, True)
    assert (a.token, a.process, a.state, a.is_over) == ("ta", Process(8, 80), "ready", False)
    assert (b.requires, b.state, b.is_over) == (("a",), "stopped", True)
    assert run.released == [Process(9, 90)]
    assert [claim["path"] for claim in a.claims_due()] == ["/dev/shm/segment"]
    assert stat.S_IMODE(os.stat(tmp_path / "journal.jsonl").st_mode) == 0o600


def test_a_cut_after_any_byte_is_read() -> None:
    """Fault 76: the last line is torn, and everything before it counts."""
    whole = b"\n".join(map(encode, ENTRIES))
    ends = [len(b"\n".join(map(encode, ENTRIES[:count]))) for count in range(1, len(ENTRIES) + 1)]
    for size in range(len(whole) + 1):
        complete = sum(end <= size for end in ends)
        run = replay(whole[:size].split(b"\n"))
        assert run.unread_count == (size not in {0, *ends, *(end + 1 for end in ends)})
        run.unread_count = 0
        assert run == replay(map(encode, ENTRIES[:complete]))


@given(st.lists(st.sampled_from(ENTRIES), max_size=12), st.integers(0, 3_000), st.binary(max_size=20))
def test_no_line_is_too_strange(entries: list[dict[str, Any]], size: int, noise: bytes) -> None:
    replay((b"\n".join(map(encode, entries))[:size] + noise).split(b"\n"))


def test_a_line_follows_one_that_was_torn_by_a_full_disk() -> None:
    torn = encode(ENTRIES[1])[:20]
    run = replay([encode(ENTRIES[0]), torn, encode(ENTRIES[2])])
    assert (run.unread_count, list(run.job("j1").services)) == (1, [("a", 1)])


def test_a_restart_is_a_new_incarnation_and_the_claims_of_the_old_one_stay_due() -> None:
    again = {**ENTRIES[2], "incarnation": 2, "token": "tc"}
    run = replay(map(encode, [*ENTRIES[:6], {**ENTRIES[7], "state": "lost"}, again, {**ENTRIES[7], "state": "ready"}]))
    first, second = run.jobs["j1"].services["a", 1], run.jobs["j1"].services["a", 2]
    assert (first.state, second.state) == ("lost", "ready")
    assert first.claims_due()
    assert not second.claims


@pytest.mark.parametrize(
    ("state", "due"),
    [
        ("ready", ["call", "path"]),
        ("killed", ["call", "path"]),
        ("lost", ["call", "path"]),
        ("cleanup_failed", ["path"]),
        ("failed_start", ["path"]),
        ("failed", ["path"]),
        ("abandoned", ["path"]),
        ("stopped", []),
    ],
)
def test_which_claims_are_due(state: str, due: list[str]) -> None:
    on_lost = {"entry": "claim", "job": "j1", "service": "a", "claim": "call", "function": "m:f", "args": []}
    ended = {"entry": "state", "job": "j1", "service": "a", "state": state}
    reaped = {"entry": "reaped", **A}
    run = replay(map(encode, [ENTRIES[2], ENTRIES[5], on_lost, ended]))
    assert [claim["claim"] for claim in run.jobs["j1"].services["a", 1].claims_due()] == due
    run = replay(map(encode, [ENTRIES[2], ENTRIES[5], on_lost, ended, reaped]))
    assert run.jobs["j1"].services["a", 1].claims_due() == []


def test_a_kept_service_belongs_to_the_job_that_uses_it_next() -> None:
    kept = {"entry": "state", "job": "j1", "service": "a", "state": "kept"}
    adopted = {"entry": "adopted", "job": "j2", "from": "j1", "service": "a"}
    run = replay(map(encode, [*ENTRIES[:6], kept, ENTRIES[9]]))
    assert not run.jobs["j1"].is_over
    run = replay(map(encode, [*ENTRIES[:3], {**ENTRIES[4], "incarnation": 2}, ENTRIES[5], kept, ENTRIES[9], adopted]))
    assert run.jobs["j1"].is_over
    assert run.jobs["j2"].services["a", 1].process == Process(8, 80)
    assert run.jobs["j2"].services["a", 1].job == "j2"


def test_what_was_seen_and_what_is_shared_goes_over_with_a_kept_service() -> None:
    entries = [
        *ENTRIES[:4],
        {"entry": "seen", "job": "j1", "service": "a", "requires": "b"},
        {"entry": "seen", "job": "j1", "service": "b", "requires": "x"},
        {"entry": "shared", "job": "j1", "service": "a", "owner": "j0"},
        {"entry": "adopted", "job": "j2", "from": "j1", "service": "a"},
    ]
    run = replay(map(encode, entries))
    assert run.seen == {("j1", "a", "b"), ("j1", "b", "x"), ("j2", "a", "b")}
    assert run.owners == {("j2", "a"): "j0"}
    assert run.unread_count == 0


def test_a_folder_made_before_by_another_is_refused(tmp_path: Path) -> None:
    """Faults 131 and 132."""
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(PermissionError, match="can be entered by others") as caught:
        make_private(str(open_to_all))
    assert "TMPDIR" in caught.value.__notes__[0]
    target = tmp_path / "target"
    target.mkdir(0o700)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(PermissionError, match="is a link"):
        make_private(str(link))
    (tmp_path / "file").touch(0o600)
    with pytest.raises(PermissionError, match="is not a folder"):
        make_private(str(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Faults 131 and 132."""
    foreign = tmp_path / "foreign"
    foreign.mkdir(0o700)
    os.chown(foreign, 12_345, 12_345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        make_private(str(foreign))


def test_a_link_in_the_place_of_the_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "journal.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="File exists"):
        Journal(str(tmp_path))
    with pytest.raises(OSError, match="symbolic links"):
        read_lines(str(tmp_path))


@pytest.mark.parametrize("path", ["/", "/etc", "/tmp/..", "/dev/shm", "/var/tmp", "~", "~/.."])
def test_nobody_owns_what_is_shared(path: str) -> None:
    with pytest.raises(ValueError, match="cannot belong to one service"):
        checked({"claim": "path", "path": os.path.expanduser(path)})


def test_claims_that_cannot_be_carried_out_are_refused_at_once() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"claim": "process", "pid": 1}, "not one that a service started"),
        ({"claim": "release", "pid": 2**22}, "there is no process"),
        ({"claim": "call", "function": "no_colon", "args": []}, "module:function"),
        ({"claim": "call", "function": "__main__:f", "args": []}, "no other process can import"),
        ({"claim": "call", "function": "m:f", "args": [object()]}, "ready for JSON"),
        ({"claim": "call", "function": "m:f", "args": "x"}, "a list, not str"),
        ({"claim": "soul"}, "not 'soul'"),
    ]
    for entry, text in refused:
        with pytest.raises(ValueError, match=text):
            checked(entry)
