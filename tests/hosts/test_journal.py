"""The journal: what is written before things are made, read by whoever takes over."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage._guardian.claims import checked
from sage._guardian.journal import (
    Journal,
    Run,
    encode,
    entries_of,
    entry,
    forget_over,
    lines_from,
    make_private,
    read_lines,
    replay,
)
from sage._processes import Process

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
    for one in ENTRIES:
        journal.write(encode(one))
    journal.close()
    run = replay(read_lines(str(tmp_path)))
    job = run.jobs["j1"]
    a, b = job.services["a", 1], job.services["b", 1]
    assert (run.cookie, run.driver, run.unread_count) == ("c0", Process(7, 70), 0)
    assert (job.name, job.is_sealed, job.is_over) == ("demo", True, True)
    assert (a.token, a.process, a.state, a.is_over) == ("ta", Process(8, 80), "ready", False)
    assert (b.requires, b.state, b.is_over) == (("a",), "stopped", True)
    assert run.released == [Process(9, 90)]
    assert [claim.path for claim in a.claims_due()] == ["/dev/shm/segment"]
    assert stat.S_IMODE(os.stat(tmp_path / "journal.jsonl").st_mode) == 0o600


def test_a_cut_after_any_byte_is_read() -> None:
    """The last line is torn, and everything before it counts."""
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


def test_kinds_and_fields_of_a_later_version_are_left_out() -> None:
    later = [{**one, "later": 1} for one in ENTRIES]
    run = replay(map(encode, [*later, {"entry": "tomorrow", "job": "j1", "service": "c"}, {"entry": "__init__"}]))
    assert run.unread_count == 2
    run.unread_count = 0
    assert run == replay(map(encode, ENTRIES))


def test_an_entry_has_the_fields_of_its_kind() -> None:
    written = [
        entry(Run.take_job, "j1", "demo", None, 1.5),
        entry(Run.take_adopted, "j2", "j1", "a"),
        entry(Run.take_cluster_started, token="k1", pid=11, started=110),
        entry(Run.take_claim, "j1", "a", **checked({"claim": "call", "function": "m:f", "args": [1]})),
    ]
    assert written == [ENTRIES[1], MORE[4], MORE[9], MORE[0]]


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
    assert [claim.claim for claim in run.jobs["j1"].services["a", 1].claims_due()] == due
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
        ({"claim": "release", "pid": 2**22}, "does not exist, so it can be neither owned nor released"),
        ({"claim": "call", "function": "no_colon", "args": []}, "module:function"),
        ({"claim": "call", "function": "__main__:f", "args": []}, "no other process can import"),
        ({"claim": "call", "function": "m:f", "args": [object()]}, "ready for JSON"),
        ({"claim": "call", "function": "m:f", "args": "x"}, "a list, not str"),
        ({"claim": "soul"}, "not 'soul'"),
    ]
    for claim, text in refused:
        with pytest.raises(ValueError, match=text):
            checked(claim)


MORE: list[dict[str, Any]] = [
    {"entry": "claim", "job": "j1", "service": "a", "claim": "call", "function": "m:f", "args": [1]},
    {"entry": "seen", "job": "j1", "service": "a", "requires": "b"},
    {"entry": "shared", "job": "j1", "service": "a", "owner": "j0"},
    {"entry": "job", "job": "j2", "name": "next", "report": "/r/2", "began_at": 2.0},
    {"entry": "adopted", "job": "j2", "from": "j1", "service": "a"},
    {"entry": "state", "job": "j2", "service": "a", "state": "kept"},
    {"entry": "reaped", **A},
    {"entry": "service", **{**A, "incarnation": 2}, "host": "process", "requires": [], "token": "tc"},
    {"entry": "cluster", "token": "k1", "jobs": "/jobs"},
    {"entry": "cluster started", "token": "k1", "pid": 11, "started": 110},
    {"entry": "cluster ended", "token": "k1"},
    {"entry": "released", "pid": 12, "started": 120},
]


@given(st.lists(st.sampled_from([*ENTRIES[1:], *MORE]), max_size=25))
def test_a_journal_that_is_written_again_tells_the_same(entries: list[dict[str, Any]]) -> None:
    run = replay(map(encode, [ENTRIES[0], *entries]))
    again = replay(map(encode, entries_of(run)))
    run.unread_count = 0
    for one in (run, again):
        one.released.sort()
    assert again == run


@given(st.lists(st.sampled_from([*ENTRIES[1:], *MORE]), max_size=25))
def test_only_what_is_over_is_forgotten(entries: list[dict[str, Any]]) -> None:
    run = replay(map(encode, [ENTRIES[0], *entries]))
    left = {job.id: job for job in run.jobs.values() if not job.is_over}
    forget_over(run)
    assert left.items() <= run.jobs.items()
    assert run.jobs.keys() - left.keys() <= set(run.owners.values())


def test_a_journal_is_replaced_all_at_once(tmp_path: Path) -> None:
    first = Journal(str(tmp_path))
    first.write(encode(ENTRIES[0]))
    second = Journal(str(tmp_path), map(encode, ENTRIES[:3]))
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    assert (first.is_in_place(), second.is_in_place()) == (False, True)
    second.write(encode(ENTRIES[3]))
    assert read_lines(str(tmp_path)) == [*map(encode, ENTRIES[:4]), b""]
    assert lines_from(first.file.descriptor) == [encode(ENTRIES[0]), b""]
    first.close()
    second.close()


def test_a_file_of_the_program_with_the_number_of_the_journal_keeps_its_time(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.write(encode(ENTRIES[0]))
    theirs = tmp_path / "theirs"
    theirs.touch()
    for path in (theirs, tmp_path / "journal.jsonl"):
        os.utime(path, (1, 1))
    number = journal.file.descriptor
    os.close(number)
    assert os.open(theirs, os.O_RDONLY) == number
    journal.keep_fresh()
    os.close(number)
    assert theirs.stat().st_mtime == 1
    assert (tmp_path / "journal.jsonl").stat().st_mtime > 1


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o710, 0o702])
def test_a_folder_that_anybody_else_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=rf"can be entered by others \(mode {mode:o}\)"):
        make_private(str(folder))


def test_what_did_not_fit_is_a_line_of_its_own_and_what_follows_is_read(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.write(encode(ENTRIES[0]))
    size = os.fstat(journal.file.descriptor).st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        with pytest.raises(OSError, match=r"10 of \d+ bytes were written"):
            journal.write(encode(ENTRIES[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for one in ENTRIES[1:4]:
        journal.write(encode(one))
    assert journal.lines_count == 4
    assert journal.is_in_place()
    journal.close()
    run = replay(read_lines(str(tmp_path)))
    assert (run.unread_count, run.jobs["j1"].name, len(run.jobs["j1"].services)) == (1, "demo", 2)


def test_a_journal_that_was_cut_or_removed_is_not_in_place(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.write(encode(ENTRIES[0]))
    assert journal.is_in_place()
    os.truncate(tmp_path / "journal.jsonl", 5)
    assert not journal.is_in_place()
    (tmp_path / "journal.jsonl").unlink()
    assert not journal.is_in_place()
    journal.close()


def test_the_claims_of_a_service_are_due_in_reverse() -> None:
    claims = [{**ENTRIES[5], "path": f"/dev/shm/{number}"} for number in range(3)]
    run = replay(map(encode, [ENTRIES[2], *claims]))
    due = run.jobs["j1"].services["a", 1].claims_due()
    assert [claim.path for claim in due] == ["/dev/shm/2", "/dev/shm/1", "/dev/shm/0"]


def test_a_job_is_forgotten_when_it_is_sealed_and_keeps_nothing() -> None:
    kept = {"entry": "state", "job": "j1", "service": "a", "state": "kept"}
    for entries, is_left in [
        (ENTRIES[:9], True),
        ([*ENTRIES[:6], kept, ENTRIES[9]], True),
        ([*ENTRIES, {"entry": "shared", "job": "j2", "service": "a", "owner": "j1"}, MORE[3]], True),
        (ENTRIES, False),
    ]:
        run = replay(map(encode, entries))
        forget_over(run)
        assert ("j1" in run.jobs) is is_left
