"""The link between two processes, with both of its ends here."""

from __future__ import annotations

import pickle
import socket
import threading
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from sage import FunctionError, JobError, JobErrorGroup, ServiceUnavailableError
from sage._remote.calls import RemoteCalls
from sage._remote.errors import sendable
from sage._remote.protocol import CallSide, served
from sage._remote.rpc import IDLE_MAX, NotReceivedError, RpcClosedError, SocketPairRpc
from sage._remote.tcp import TcpRpcClient, TcpRpcServer
from sage.errors import describe, hint

if TYPE_CHECKING:
    from collections.abc import Iterator

SOON_S = 10.0
SECRET = b"shared by both sides"


class Asked(Protocol):
    """What the other side answers."""

    def echo(self, *values: Any) -> tuple[Any, ...]: ...

    def note(self) -> None: ...

    def wait(self) -> None: ...

    def fail(self, text: str) -> None: ...

    def fail_after(self, text: str) -> None: ...


class Pair(Asked):
    """Two links; the other one answers here."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        self.is_asked, self.go_on = threading.Event(), threading.Event()
        self.closed: list[str] = []
        self.has_ended = threading.Event()
        self.link = SocketPairRpc(here, {}, {}, "asks", lambda: None)
        self.other = SocketPairRpc(there, served((Asked, self)), {}, "answers", self.end)
        self.link.begin()
        self.other.begin()

    def end(self) -> None:
        self.closed.append("answers")
        self.has_ended.set()

    def echo(self, *values: Any) -> tuple[Any, ...]:
        return values

    def note(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        self.is_asked.set()
        assert self.go_on.wait(SOON_S)

    def fail(self, text: str) -> None:
        raise KeyError(text)

    def fail_after(self, text: str) -> None:
        try:
            self.fail(text)
        except KeyError as error:
            raise ValueError("failed") from error


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.go_on.set()
    made.link.close(SOON_S)
    made.other.close(SOON_S)


def test_a_late_answer_is_given_to_nobody(pair: Pair) -> None:
    """The next request on the same connection would take it for its own."""
    assert pair.link.ask(Asked.echo, "first") == ("first",)
    with pytest.raises(TimeoutError):
        pair.link.ask_within(0.05, Asked.wait)
    pair.go_on.set()
    assert [pair.link.ask(Asked.echo, number) for number in range(3)] == [(number,) for number in range(3)]


def test_an_error_arrives_and_the_connection_goes_on(pair: Pair) -> None:
    for _ in range(2):
        with pytest.raises(KeyError, match="missing"):
            pair.link.ask(Asked.fail, "missing")
    assert pair.link.ask(Asked.echo, "next") == ("next",)


def test_an_error_arrives_with_its_cause(pair: Pair) -> None:
    with pytest.raises(ValueError, match="failed") as caught:
        pair.link.ask(Asked.fail_after, "missing")
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    assert cause.args == ("missing",)
    for error, line in ((caught.value, "in fail_after"), (cause, "in fail")):
        (note,) = error.__notes__
        assert note.startswith("In the process answers:\n")
        assert line in note


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(sendable(value, "far")))


def test_errors_in_a_value_arrive_with_their_causes_and_are_the_same_in_each_place() -> None:
    error = FunctionError("it failed", operator="map")
    error.__cause__ = KeyError("missing")
    group = JobErrorGroup("both", [error, hint(JobError("other"), "a note")], job="job")
    there, first, other = sent([group, error, group.exceptions[1]])
    assert there.exceptions == (first, other)
    assert (str(there), there.job, first.operator, other.__notes__) == (str(group), "job", "map", ["a note"])
    assert repr(first.__cause__) == "KeyError('missing')"


def test_an_error_that_cannot_be_pickled_is_sent_as_its_text() -> None:
    error = hint(KeyError(threading.Lock()), "a note")
    (arrived,) = sent([error])
    assert (type(arrived), str(arrived), arrived.__notes__) == (JobError, describe(error), ["a note"])


def test_what_has_no_answer_takes_none_of_another(pair: Pair) -> None:
    pair.link.post(Asked.note)
    assert pair.link.ask(Asked.echo, "first") == ("first",)
    pair.link.post(Asked.fail, "posted")
    assert pair.link.ask(Asked.echo, "next") == ("next",)
    pair.link.tell(Asked.fail, "told")
    assert pair.link.ask(Asked.echo, 2) == (2,)


@pytest.mark.parametrize("side", ["asks", "answers"])
def test_a_request_that_waits_hears_that_the_link_was_shut(pair: Pair, side: str) -> None:
    raised: list[str] = []

    def ask() -> None:
        with pytest.raises(RpcClosedError) as caught:
            pair.link.ask(Asked.wait)
        raised.append(str(caught.value))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert pair.is_asked.wait(SOON_S)
    (pair.link if side == "asks" else pair.other).shut()
    asking.join(SOON_S)
    assert raised == ["the other side is gone"]
    assert pair.has_ended.wait(SOON_S)
    assert pair.closed == ["answers"]


def test_a_link_that_was_shut_takes_no_request(pair: Pair) -> None:
    pair.link.ask(Asked.echo, "first")
    pair.link.close(SOON_S)
    for _ in range(2):
        with pytest.raises(RpcClosedError, match="the link is closed"):
            pair.link.ask(Asked.echo, "late")


def test_no_more_connections_are_kept_than_the_limit(pair: Pair) -> None:
    barrier = threading.Barrier(IDLE_MAX + 8)

    def ask() -> None:
        barrier.wait(SOON_S)
        for number in range(20):
            assert pair.link.ask(Asked.echo, number) == (number,)

    threads = [threading.Thread(target=ask) for _ in range(IDLE_MAX + 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < len(pair.link._idle) <= IDLE_MAX


class Service:
    """Has a method that waits, in a server of its own."""

    def __init__(self, name: str) -> None:
        self.name, self.begun, self.go_on = name, threading.Event(), threading.Event()
        self.server = TcpRpcServer("127.0.0.1", SECRET, served((CallSide, self)), {}, name)
        self.client = TcpRpcClient(self.server.address, SECRET, {})
        self.server.begin()

    def attribute(self, service: str, name: str) -> tuple[bool, object]:
        return True, False

    def call(self, service: str, name: str, args: tuple[bool], kwargs: object, timeout_s: float | None) -> str:
        if args[0]:
            self.begun.set()
            assert self.go_on.wait(SOON_S)
        return self.name

    def close(self) -> None:
        self.go_on.set()
        self.server.close(SOON_S)
        self.client.close()


@pytest.fixture
def services() -> Iterator[list[Service]]:
    made = [Service("first"), Service("second")]
    yield made
    for service in made:
        service.close()


def test_a_call_that_a_dead_process_has_not_received_is_made_by_the_next_one(services: list[Service]) -> None:
    """Also one over a connection that was open when the process died."""
    left = [service.client for service in services]
    calls = RemoteCalls("service", None, lambda *_: left.pop(0))
    assert calls.call("method", (False,), {}, None) == "first"
    services[0].server.close(SOON_S)
    assert calls.call("method", (False,), {}, None) == "second"
    for _ in range(2):  # over an idle connection, and over a new one
        with pytest.raises(NotReceivedError):
            services[0].client.ask(CallSide.attribute, "service", "method")


def test_a_call_that_a_dead_process_has_received_fails(services: list[Service]) -> None:
    left = [service.client for service in services]
    calls = RemoteCalls("service", None, lambda *_: left.pop(0))
    call = calls.call_async("method", (True,), {}, None)
    assert services[0].begun.wait(SOON_S)
    services[0].server.shut()
    with pytest.raises(ServiceUnavailableError, match="has no process any more"):
        call.result(SOON_S)
    assert calls.call("method", (False,), {}, None) == "second"
    calls.close()


def test_a_call_that_this_side_gives_up_may_have_been_received(services: list[Service]) -> None:
    client = services[0].client
    client.ask(CallSide.attribute, "service", "method")
    client.shut()
    with pytest.raises(RpcClosedError) as caught:
        client.ask(CallSide.attribute, "service", "method")
    assert caught.type is RpcClosedError
