"""What a service in a process of its own costs: calls, large arrays, and stopping many of them."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
from multiprocessing import Pipe, get_context
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.measure import at_least, at_most, spread
from sage import BaseService, JobErrorGroup, LocalEnvironment, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from benchmarks.measure import Figure, Scale

ARRAY_BYTES = 10_000_000
CALLS = 200
"""How many calls one side makes before the other has its turn."""

SERVICES = 20
BOUND_S = 1.0
SOON_S = 60.0


class Array:
    """Bytes that travel beside their pickle, as those of a numpy array do."""

    def __init__(self, room: Any) -> None:
        self.room = room

    def __reduce_ex__(self, _: Any) -> tuple[type[Array], tuple[pickle.PickleBuffer]]:
        return Array, (pickle.PickleBuffer(self.room),)


class Answering:
    """Answers at once."""

    def process(self, data: int) -> int:
        """Return what came."""
        return data

    def length(self, array: Array) -> int:
        """Return how many bytes an array has."""
        return memoryview(array.room).nbytes


class Hanging(BaseService):
    """Does not come back from its `stop` if it is told so."""

    def __init__(self, hangs: bool) -> None:
        self.hangs = hangs

    def stop(self) -> None:
        """Hang, or do nothing."""
        if self.hangs:
            threading.Event().wait()


@contextlib.contextmanager
def answering() -> Iterator[Any]:
    """Run a service in a process of its own, and give its handle."""
    with LocalEnvironment("answering") as env:
        handle = env.register_service("answering", Answering, options=ServiceOptions(host="process"))
        # What waits for ever keeps the job running; the end of the environment ends it.
        is_up = threading.Event()
        env.from_source(lambda: is_up.set() or 1, delay=0.01).sink(int)
        env.submit()
        if not is_up.wait(SOON_S):
            raise TimeoutError("the service did not start")
        yield handle


@contextlib.contextmanager
def other_process(work: Callable[[Any], None], ours: Any, theirs: Any) -> Iterator[Any]:
    """Run `work` in a process with the other end of a connection, and give this one."""

    def run() -> None:
        ours.close()
        work(theirs)
        os._exit(0)

    # Nothing that was imported matters to it, and a forked one is there at once.
    process = get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


@contextlib.contextmanager
def on_one_processor() -> Iterator[None]:
    """Keep this thread, and all threads and processes that it starts meanwhile, on one processor.

    A call that waits for its answer uses one at a time anyway. Where the system puts the other process decides by a
    factor of two and more, and it may put those of the two sides in different places, which says nothing of either.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def echo(connection: Connection) -> None:
    """Send back what comes, until nothing does, pickled as a service does it."""
    with contextlib.suppress(EOFError):
        while True:
            connection.send_bytes(pickle.dumps(pickle.loads(connection.recv_bytes()), 5))


def count(connection: socket.socket) -> None:
    """Take arrays in and answer with one byte to each, until none comes."""
    room = memoryview(bytearray(ARRAY_BYTES))
    while True:
        have = 0
        while have < ARRAY_BYTES:
            size = connection.recv_into(room[have:])
            if not size:
                return
            have += size
        connection.send(b".")


def process_call(scale: Scale) -> Iterator[Figure]:
    """A call with a small argument, against the same pickles through a bare pipe; one at a time, on one processor."""
    request = ("call", "process", (1,), {})
    with on_one_processor(), other_process(echo, *Pipe()) as pipe, answering() as handle:

        def through_pipe() -> None:
            # Its own `send` and `recv` make a pickler of multiprocessing for each value, which is no part of a pipe.
            pipe.send_bytes(pickle.dumps(request, 5))
            if pickle.loads(pipe.recv_bytes()) != request:
                raise AssertionError("another answer came back")

        def through_service() -> None:
            if handle.process(1) != 1:
                raise AssertionError("another answer came back")

        ratios = []
        for number in range(scale.short_rounds):
            sides: list[Callable[[], Any]] = [through_pipe, through_service]
            medians = {}
            for place in (0, 1) if number % 2 == 0 else (1, 0):
                medians[place] = spread([seconds(sides[place]) for _ in range(CALLS)])[0]
            ratios.append(medians[1] / medians[0])
    yield at_most("process-call, small argument", "times a bare pipe", 1.5, ratios)


def process_callers(scale: Scale) -> Iterator[Figure]:
    """Calls of 16 and 64 threads at once, against the same pickles through a pipe that they take in turn."""
    request, turn = ("call", "process", (1,), {}), threading.Lock()
    with on_one_processor(), other_process(echo, *Pipe()) as pipe, answering() as handle:

        def through_pipe() -> None:
            with turn:
                pipe.send_bytes(pickle.dumps(request, 5))
                pickle.loads(pipe.recv_bytes())

        for callers in (16, 64):
            ratios = []
            for number in range(scale.rounds):
                sides = [through_pipe, lambda: handle.process(1)]
                taken = {place: at_once(sides[place], callers) for place in ((0, 1) if number % 2 == 0 else (1, 0))}
                ratios.append(taken[0] / taken[1])
            yield at_least(f"process-call, {callers} callers", "of the rate of a pipe with a lock", 0.9, ratios)


def at_once(side: Callable[[], Any], callers: int) -> float:
    """Return how long it takes until each of some threads has made its calls."""

    def work() -> None:
        for _ in range(CALLS):
            side()

    threads = [threading.Thread(target=work) for _ in range(callers)]
    began_at = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - began_at


def process_array(scale: Scale) -> Iterator[Figure]:
    """Ten megabytes to a service, against the same bytes through a bare socket."""
    array = Array(bytearray(os.urandom(1000)) * (ARRAY_BYTES // 1000))
    with other_process(count, *socket.socketpair()) as plain, answering() as handle:

        def through_socket() -> None:
            plain.sendall(array.room)
            plain.recv(1)

        def through_service() -> None:
            if handle.length(array) != ARRAY_BYTES:
                raise AssertionError("some bytes were lost")

        ratios = []
        for number in range(scale.short_rounds):
            sides = [through_socket, through_service]
            taken = {place: seconds(sides[place]) for place in ((0, 1) if number % 2 == 0 else (1, 0))}
            ratios.append(taken[0] / taken[1])
    yield at_least("process-array, 10 MB", "of the rate of a bare socket", 0.5, ratios)


def process_stop(scale: Scale) -> Iterator[Figure]:
    """Twenty services, one of which hangs in its `stop`: from the last record to the return."""
    bounds = []
    ended_at: list[float] = []
    for _ in range(max(scale.rounds // 3, 1)):
        env = LocalEnvironment("stopping")
        for number in range(SERVICES):
            # The hanging one would have a cleanup of its own; it has none, so that its bound is one bound.
            after = [f"service {number - 1}"] if number == SERVICES - 1 else []
            options = ServiceOptions(host="process", stop_timeout_s=BOUND_S, kill_grace_s=BOUND_S, depends_on=after)
            env.register_service(f"service {number}", Hanging, number == SERVICES // 2, options=options)
        env.from_batch([1]).sink(lambda _: ended_at.append(time.monotonic()))
        with contextlib.suppress(JobErrorGroup):
            env.submit(autostop=True)
        bounds.append((time.monotonic() - ended_at[-1]) / BOUND_S)
    yield at_most("process-stop, 20 services, 1 hangs", "times the bound of a hook", 2.0, bounds)


def seconds(side: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    began_at = perf_counter()
    side()
    return perf_counter() - began_at
