"""The Ray that `sage cluster up` keeps: that of a driver that does nothing but wait until it is told to end.

python -m sage._ray.kept_cluster      prints its address, or its error, as one line of JSON, and stays
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from sage._guardian.journal import check_private, make_private
from sage._guardian.lease import runs_folder
from sage._guardian.run_folder import reap_folder
from sage._processes import Grace, Process, end_all, is_alive, process, send, wait_gone, with_cookie
from sage._ray.local_cluster import LocalRay
from sage.errors import CleanupError, ControlError, SageError, hint

WARM = "warm"
"""The address that stands for it."""

STATE = "cluster.json"
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
END_TIMEOUT_S = 30.0


class KeptCluster(NamedTuple):
    """A Ray that is kept, and by which process."""

    address: str
    token_path: str
    folder: str
    cookie: str
    began_at: float
    keeper: Process
    run_folder: str


def kept_cluster() -> KeptCluster | None:
    """Return the Ray that is kept for this user, or None."""
    warm = _read()
    return warm if warm is not None and is_alive(warm.keeper) else None


def end_kept_cluster() -> KeptCluster | None:
    """End the warm Ray, or the rest of one whose keeper was killed, and return which it was.

    Raises:
        CleanupError: something of it cannot be ended.
        PermissionError: others can write where it is noted, so nothing of it can be trusted.
    """
    warm = _read()
    if warm is None:
        return None
    send(warm.keeper, signal.SIGTERM, signal.SIGCONT)
    grace = Grace(time.monotonic() + END_TIMEOUT_S)
    try:
        wait_gone([warm.keeper], grace)
    finally:
        grace.close()
    # A keeper that was killed has a guardian that does the same; if both were, this does the work of `sage gc`.
    end_all(lambda: {warm.keeper} if is_alive(warm.keeper) else set())
    if os.path.isdir(warm.run_folder):
        reap_folder(warm.run_folder, lambda _: None)
    left = end_all(lambda: with_cookie(warm.cookie.rpartition(":")[2])).left
    if left:
        pids = ", ".join(str(one.pid) for one in sorted(left))
        raise CleanupError(f"processes {pids} of the cluster cannot be ended", fault="external")
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(runs_folder(), STATE))
    return warm


def _read() -> KeptCluster | None:
    root = runs_folder()
    try:
        check_private(root)
        with open(os.path.join(root, STATE), encoding="utf-8") as file:
            fields = json.load(file)
    except FileNotFoundError:
        return None
    return KeptCluster(
        **{"run_folder": os.path.dirname(fields["folder"]), **fields, "keeper": Process(*fields["keeper"])}
    )


def _write(warm: KeptCluster) -> None:
    root = runs_folder()
    with tempfile.NamedTemporaryFile("w", dir=root, delete=False, encoding="utf-8") as file:
        json.dump(warm._asdict(), file)
    os.replace(file.name, os.path.join(root, STATE))


def main() -> None:
    """Keep a Ray until SIGTERM; a second one beside it is refused."""

    def end(*_: object) -> None:
        for number in ENDING:
            signal.signal(number, lambda *_: None)  # the end itself is not to be broken off
        raise SystemExit(0)

    for number in ENDING:
        signal.signal(number, end)
    try:
        _keep()
    except (SageError, OSError) as error:
        _answer({"error": str(error), "notes": list(getattr(error, "__notes__", ()))})
        sys.exit(1)


def _keep() -> None:
    root = runs_folder()
    make_private(root)
    # Held as long as this process lives; nothing else locks the folder itself.
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise hint(ControlError("a cluster is already being started or ended"), "See: sage cluster status") from None
    own = process(os.getpid())
    assert own is not None
    ray = LocalRay()
    try:
        _write(KeptCluster(ray.address, ray.token_path, ray.folder, ray.cookie, time.time(), own, ray.run_folder))
        _answer({"address": ray.address})
        threading.Event().wait()
    finally:
        ray.end()
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(root, STATE))


def _answer(answer: dict[str, object]) -> None:
    """Tell whoever started this, and let go of its output, which would otherwise never end."""
    with suppress(OSError):
        os.write(1, json.dumps(answer).encode() + b"\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    main()
