"""Channels: bounds, order, closing, waking."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from sage._runtime.channel import Channel, InFlight, ends
from sage.records import END_OF_STREAM, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence


def nobody() -> None:
    """Stands for a producer that need not be woken."""


def batch(*values: int) -> Batch:
    return Batch(list(values))


def drain(channel: Channel) -> list[tuple[int, Sequence[int]]]:
    taken = []
    while (element := channel.get_nowait()) is not None:
        assert isinstance(element[1], Batch)
        taken.append((element[0], element[1].values))
    return taken


def test_first_in_first_out() -> None:
    """Acceptance 34: per producer, records arrive in order, each with the input that it came by."""
    channel = Channel()
    for port, value in [(0, 1), (1, 10), (0, 2), (1, 11)]:
        assert channel.put_nowait(port, batch(value), nobody)
    assert drain(channel) == [(0, [1]), (1, [10]), (0, [2]), (1, [11])]
    assert channel.get_nowait() is None


def test_takes_in_while_fewer_records_wait_than_the_bound() -> None:
    """Acceptance 30: at most one batch more than the bound is held."""
    channel = Channel(capacity_records=4)
    assert channel.put_nowait(0, batch(1, 2, 3), nobody)
    assert channel.put_nowait(0, batch(4, 5, 6), nobody)
    assert not channel.put_nowait(0, batch(7), nobody)
    assert channel.fill == 6 / 4


def test_the_end_of_a_stream_waits_behind_its_records() -> None:
    """Acceptance 24: the end is an element like others and overtakes nothing."""
    channel = Channel(capacity_records=1)
    assert channel.put_nowait(0, batch(1), nobody)
    assert not channel.put_nowait(0, END_OF_STREAM, nobody)
    assert drain(channel) == [(0, [1])]
    assert channel.put_nowait(0, END_OF_STREAM, nobody)
    taken = channel.get_nowait()
    assert taken is not None
    assert ends(taken[1])
    assert not ends(batch())


def test_a_producer_is_woken_once_there_is_room() -> None:
    """Acceptance 30: a producer that found no room is woken once, when room was made and not before."""
    woken: list[str] = []
    channel = Channel(capacity_records=2)
    channel.put_nowait(0, batch(1, 2), nobody)
    channel.put_nowait(0, batch(3), nobody, force=True)
    assert not channel.put_nowait(0, batch(4), lambda: woken.append("a"))
    assert not channel.put_nowait(1, batch(5), lambda: woken.append("b"))
    assert woken == []
    channel.get_nowait()
    assert woken == ["a", "b"]
    channel.get_nowait()
    assert woken == ["a", "b"]


def test_a_producer_is_not_woken_while_the_channel_is_still_full() -> None:
    """Acceptance 30: taking one of many elements does not make room yet."""
    woken: list[str] = []
    channel = Channel(capacity_records=1)
    for value in range(3):
        channel.put_nowait(0, batch(value), nobody, force=True)
    assert not channel.put_nowait(0, batch(9), lambda: woken.append("a"))
    channel.get_nowait()
    channel.get_nowait()
    assert woken == []
    channel.get_nowait()
    assert woken == ["a"]


def test_the_consumer_is_woken_when_the_first_element_arrives() -> None:
    """Acceptance 28: a consumer sleeps only while its channel is empty, and one wake is enough for all that wait."""
    woken: list[str] = []
    channel = Channel()
    channel.wake_consumer = lambda: woken.append("consumer")
    channel.put_nowait(0, batch(1), nobody)
    channel.put_nowait(0, batch(2), nobody)
    assert woken == ["consumer"]
    drain(channel)
    channel.put_nowait(0, END_OF_STREAM, nobody)
    assert woken == ["consumer", "consumer"]


def test_feedback_is_taken_in_though_the_channel_is_full() -> None:
    """Acceptance 28: a loop never waits for itself."""
    channel = Channel(capacity_records=1)
    assert channel.put_nowait(0, batch(1), nobody)
    assert channel.put_nowait(1, batch(2), nobody, force=True)
    assert drain(channel) == [(0, [1]), (1, [2])]


def test_close_drops_counts_and_wakes() -> None:
    """Acceptance 20: what a cancelled job leaves behind is counted, and no producer waits for ever."""
    woken: list[str] = []
    channel = Channel(capacity_records=2)
    channel.put_nowait(0, batch(1, 2), nobody)
    channel.put_nowait(0, END_OF_STREAM, nobody, force=True)
    assert not channel.put_nowait(1, batch(3), lambda: woken.append("a"))
    assert channel.close() == 2
    assert woken == ["a"]
    assert channel.get_nowait() is None
    assert channel.close() == 0


def test_a_closed_channel_takes_everything_in_and_counts_it_as_undelivered() -> None:
    """Acceptance 20: a producer behind a closed channel goes on, and its records are counted."""
    channel = Channel(capacity_records=1)
    channel.close()
    assert channel.put_nowait(0, batch(1, 2), nobody)
    assert channel.put_nowait(0, batch(3), nobody)
    assert channel.put_nowait(0, END_OF_STREAM, nobody)
    assert channel.undelivered == 3
    assert channel.get_nowait() is None


def test_what_is_in_flight_is_counted_exactly() -> None:
    """Acceptance 28: a loop is over exactly when nothing is on its way, with no guess about time."""
    empty: list[bool] = []
    counter = InFlight()
    counter.when_zero(lambda: empty.append(True))
    channel = Channel(capacity_records=1)
    channel.counters = (counter,)
    channel.put_nowait(0, batch(1), nobody)
    assert not channel.put_nowait(0, batch(2), nobody)
    assert not counter.is_zero
    channel.get_nowait()
    assert not counter.is_zero, "the consumer has not finished with it yet"
    counter.add(-1)
    assert counter.is_zero
    assert empty == [True]


def test_close_takes_what_it_drops_off_the_count() -> None:
    """Acceptance 28: a loop ends also when one of its channels is closed with elements inside."""
    counter = InFlight()
    channel = Channel()
    channel.counters = (counter,)
    channel.put_nowait(0, batch(1, 2), nobody)
    channel.put_nowait(0, batch(3), nobody)
    channel.close()
    channel.put_nowait(0, batch(4), nobody)
    assert counter.is_zero


@given(st.lists(st.one_of(st.none(), st.integers(0, 3))), st.integers(1, 5))
def test_a_channel_is_a_bounded_queue(moves: list[int | None], capacity: int) -> None:
    """Acceptance 30: after any puts and gets the channel holds what a plain queue with that bound would hold."""
    channel, model, number = Channel(capacity_records=capacity), deque[list[int]](), 0
    for size in moves:
        waiting = sum(map(len, model))
        if size is None:
            taken = channel.get_nowait()
            assert (None if taken is None else taken[1]) is None or model
            if taken is not None:
                assert isinstance(taken[1], Batch)
                assert taken[1].values == model.popleft()
            else:
                assert not model
        else:
            values = [number := number + 1 for _ in range(size)]
            accepted = channel.put_nowait(0, Batch(values), nobody)
            assert accepted == (waiting < capacity)
            if accepted:
                model.append(values)
        assert channel.fill == sum(map(len, model)) / capacity
