"""Services for tests of hosts: at the top of a module, so that any process can import them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from support.recording_services import Notes

from sage import BaseService

if TYPE_CHECKING:
    from collections.abc import Callable

SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()",
]


class Rows:
    """Bytes that travel beside their pickle, as those of a numpy array do."""

    def __init__(self, room: Any) -> None:
        self.room = room

    def __reduce_ex__(self, _: Any) -> tuple[type[Rows], tuple[pickle.PickleBuffer]]:
        return Rows, (pickle.PickleBuffer(self.room),)


class Unpicklable:
    """Cannot leave its process."""

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("it stays here")


class OddError(Exception):
    """Pickles, but cannot be rebuilt."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")


class FullError(Exception):
    """Comes through a pickle with its fields."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class LockedError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Tools(BaseService):
    """Does what a test asks for."""

    def __init__(self, amount: int = 1) -> None:
        self.amount = amount
        self.calls = 0
        self.pid = os.getpid()

    def process(self, data: Any) -> Any:
        return data + self.amount

    def count(self) -> int:
        """Return which call of this instance it is."""
        self.calls += 1
        return self.calls

    async def later(self, data: int) -> int:
        return data * 2

    def fail(self, text: str) -> None:
        raise KeyError(text)

    def fail_with(self, error: BaseException) -> None:
        raise error

    def fail_oddly(self, kind: str) -> None:
        raise OddError(7, "odd") if kind == "odd" else LockedError("locked")

    def give(self, kind: str) -> Any:
        return {"lambda": lambda: 7, "lock": threading.Lock(), "unpicklable": Unpicklable()}[kind]

    def send_back(self, data: Any) -> Any:
        return data

    def length(self, rows: Any) -> tuple[int, int, str]:
        view = memoryview(rows.room if isinstance(rows, Rows) else rows)
        return view.nbytes, sum(view[:: view.nbytes // 100]), type(rows).__name__

    def slow(self, seconds: float, answer: str) -> str:
        time.sleep(seconds)
        return answer

    def log(self, level: int, text: str) -> None:
        self.logger.log(level, "%s from %d", text, os.getpid())

    def log_error(self) -> None:
        try:
            raise ValueError("seen there")
        except ValueError:
            logging.getLogger("another.package").exception("it failed")

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def ask(self, name: str, data: Any) -> Any:
        return self.call_service(name, data)

    def ask_in_time(self, name: str, method: str, timeout: float, *args: Any) -> Any:
        return self.call_service(name, *args, method=method, timeout=timeout)

    def ask_later(self, name: str, numbers: list[int]) -> list[int]:
        futures = [self.call_service_async(name, number) for number in numbers]
        return [future.result(10) for future in futures]

    def countdown(self, data: int) -> list[int]:
        rest: list[int] = self.call_service(self.name, data - 1, method="countdown") if data else []
        return [data, *rest]

    def die(self, how: str) -> None:
        die(how)


def die(how: str) -> None:
    """End this process in a way that no code of it can answer."""
    deaths: dict[str, Callable[[], object]] = {
        "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "_exit": lambda: os._exit(3),
        "SIGSEGV": segfault,
        "fork": leave_a_copy,
    }
    deaths[how]()


def segfault() -> None:
    with contextlib.suppress(OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def leave_a_copy() -> None:
    """End this process, but for a copy that holds every descriptor open; Python knows nothing of this fork."""
    libc = ctypes.PyDLL(None)  # which keeps the lock of the interpreter, so that the copy has it too
    # SIGTERM may come before the copy waits, and must still wake it; `pause` would only wait for the next one.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if libc.fork() == 0:
        libc.sigsuspend(bytes(128))  # an empty set of blocked signals
    os._exit(3)


class Crowd:
    """Counts how many of its calls run at once."""

    def __init__(self, call_s: float) -> None:
        self.call_s = call_s
        self.inside = 0
        self.inside_max = 0
        self.calls = 0
        self.lock = threading.Lock()

    def process(self, record: int) -> int:
        with self.lock:
            self.calls += 1
            self.inside += 1
            self.inside_max = max(self.inside_max, self.inside)
        time.sleep(self.call_s)
        with self.lock:
            self.inside -= 1
        return record


class Mortal(BaseService):
    """The first instances die in their third call."""

    def __init__(self, notes: Notes, deaths: int, how: str) -> None:
        notes.append("build")
        self.notes = notes
        self.number = notes.lines().count("build")
        self.is_mortal = self.number <= deaths
        self.how = how
        self.calls = 0

    def process(self, data: Any) -> int:
        self.calls += 1
        if self.is_mortal and self.calls >= 3:
            die(self.how)
        return self.number

    def cleanup(self) -> None:
        self.notes.append(f"cleanup {self.number}")


class Departing(BaseService):
    """Leaves something to the end of its process."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def setup(self) -> None:
        atexit.register(self.notes.append, "at exit")
        self.is_over = threading.Event()
        threading.Thread(target=self.wait_for_the_end).start()

    def wait_for_the_end(self) -> None:
        self.is_over.wait()
        self.notes.append("thread")

    def cleanup(self) -> None:
        sys.stdout.write("no end of a line")
        self.is_over.set()


class Leaving(BaseService):
    """Uses everything that a context offers."""

    def __init__(self, notes: Notes, folder: str, fails: bool = False) -> None:
        self.notes = notes
        self.folder = folder
        self.ctx.defer(lambda: notes.append("deferred first"))
        if fails:
            raise OSError("no such model")

    def setup(self) -> None:
        self.ctx.own_path(self.folder)
        os.mkdir(self.folder)
        self.ctx.on_lost(f"{note_loss.__module__}:{note_loss.__name__}", [str(self.notes.path), self.name])
        self.ctx.defer(lambda: self.notes.append("deferred last"))

    def process(self, data: Any) -> Any:
        if data == "die":
            die("SIGKILL")
        return data

    def cleanup(self) -> None:
        self.ctx.extend_timeout(20.0)
        time.sleep(0.6)  # more than the bound, less than it was extended to
        os.rmdir(self.folder)
        self.notes.append("cleanup")


def note_loss(path: str, name: str) -> None:
    """Act on the loss of a service."""
    with open(path, "a") as file:
        file.write(f"lost {name}\n")


class Stuck(BaseService):
    """Hangs in one of its hooks."""

    def __init__(self, notes: Notes, hook: str, how: str) -> None:
        self.notes, self.hook, self.how = notes, hook, how
        self.reach("build")

    def reach(self, hook: str) -> None:
        self.notes.append(hook)
        if hook != self.hook:
            return
        if self.how == "python":
            self.hang_here()
        elif self.how == "C":
            # A call through PyDLL keeps the interpreter's lock, as a bad extension module does.
            ctypes.PyDLL(None).sleep(1000)
        elif self.how == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
            self.hang_here()  # this thread may go on for a moment

    def hang_here(self) -> None:
        threading.Event().wait()

    def setup(self) -> None:
        self.reach("setup")

    def process(self, data: Any) -> Any:
        self.reach("call")
        return data

    def stop(self) -> None:
        self.reach("stop")

    def cleanup(self) -> None:
        self.reach("cleanup")


class Parent(BaseService):
    """Starts processes and forgets them."""

    def __init__(self, kind: str) -> None:
        words = STUBBORN if "stubborn" in kind else SLEEPER
        environment: dict[str, str] | None = {} if "cleared" in kind else None
        child = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session="session" in kind, env=environment)
        assert child.stdout is not None
        child.stdout.readline()
        if "stopped" in kind:
            os.kill(child.pid, signal.SIGSTOP)
        if "released" in kind:
            self.ctx.release_process(child.pid)
        self.child = child.pid

    def process(self, data: Any) -> int:
        return self.child


class Printing(BaseService):
    """Prints from every hook."""

    def process(self, data: Any) -> Any:
        print("call")
        return data

    def cleanup(self) -> None:
        print("cleanup out")
        print("cleanup error", file=sys.stderr)


class Listening(BaseService):
    """Holds a port, and a thread that is no daemon."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=threading.Event().wait, daemon=False)
        self.thread.start()

    def process(self, data: Any) -> int:
        port: int = self.socket.getsockname()[1]
        return port
