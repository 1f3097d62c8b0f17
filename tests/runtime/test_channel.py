"""Channels: bounds, order, closing, waking."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage._runtime.channel import Channel, InFlight, ends
from sage.records import BATCH_RECORDS_MAX, END_OF_STREAM, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sage.records import Element


def nobody() -> None:
    """Stands for a producer that need not be woken."""


def batch(*values: int) -> Batch:
    return Batch(list(values))


def drain(channel: Channel) -> list[tuple[int, Sequence[object]]]:
    taken = []
    while (element := channel.get_nowait()) is not None:
        assert isinstance(element[1], Batch)
        taken.append((element[0], element[1].values))
    return taken


def test_first_in_first_out() -> None:
    """Per producer, records arrive in order, each with the input that it came by."""
    channel = Channel()
    for port, value in [(0, 1), (1, 10), (0, 2), (1, 11)]:
        assert channel.put_nowait(port, batch(value), nobody)
    assert drain(channel) == [(0, [1]), (1, [10]), (0, [2]), (1, [11])]
    assert channel.get_nowait() is None


def test_takes_in_while_fewer_records_wait_than_the_bound() -> None:
    """At most one batch more than the bound is held."""
    channel = Channel(capacity_records=4)
    assert channel.put_nowait(0, batch(1, 2, 3), nobody)
    assert channel.put_nowait(0, batch(4, 5, 6), nobody)
    assert not channel.put_nowait(0, batch(7), nobody)
    assert channel.fill == 6 / 4


def test_the_end_of_a_stream_waits_behind_its_records() -> None:
    """The end is an element like others and overtakes nothing."""
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
    """A producer that found no room is woken once, when room was made and not before."""
    woken: list[str] = []
    channel = Channel(capacity_records=2)
    channel.put_nowait(0, batch(1, 2), nobody)
    channel.put_nowait(0, batch(3), nobody, force=True)
    assert not channel.put_nowait(0, batch(4), lambda: woken.append("a"))
    assert not channel.put_nowait(1, batch(5), lambda: woken.append("b"))
    assert woken == []
    channel.get_nowait()
    assert woken == ["a"]
    channel.get_nowait()
    assert woken == ["a", "b"]
    assert channel.get_nowait() is None
    assert woken == ["a", "b"]


def test_the_one_that_has_put_wakes_the_next_while_there_is_room() -> None:
    woken: list[str] = []
    channel = Channel(capacity_records=2)
    channel.put_nowait(0, batch(1, 2), nobody)
    wakes = [lambda name=name: woken.append(name) for name in "abc"]
    for wake in (wakes[0], wakes[1], wakes[2], wakes[1]):
        assert not channel.put_nowait(0, batch(9), wake)
    channel.get_nowait()
    assert woken == ["a"]
    assert channel.put_nowait(0, batch(9), wakes[0])
    assert woken == ["a", "b"]
    assert channel.put_nowait(0, batch(9), wakes[1])
    assert woken == ["a", "b"]  # it is full again
    channel.get_nowait()
    assert woken == ["a", "b", "c"]


def test_a_producer_that_gives_up_lets_the_next_one_have_its_room() -> None:
    woken: list[str] = []
    channel = Channel(capacity_records=1)
    channel.put_nowait(0, batch(1), nobody)
    wakes = [lambda name=name: woken.append(name) for name in "ab"]
    for wake in wakes:
        assert not channel.put_nowait(0, batch(9), wake)
    channel.get_nowait()
    channel.give_up(wakes[0])
    assert woken == ["a", "b"]


@pytest.mark.parametrize("producers", [10, 100, 1_000])
def test_each_element_wakes_at_most_two_producers_however_many_wait(producers: int) -> None:
    channel = Channel(capacity_records=3)
    left = dict.fromkeys(range(producers), 5)
    ready = deque(left)
    woken = 0

    class Producer:
        def __init__(self, number: int) -> None:
            self.number = number

        def wake(self) -> None:
            nonlocal woken
            woken += 1
            ready.append(self.number)

    everyone = [Producer(number) for number in left]
    taken = 0
    while ready or taken < 5 * producers:
        while ready:
            number = ready.popleft()
            while left[number] and channel.put_nowait(0, batch(number), everyone[number].wake):
                left[number] -= 1
        taken += channel.get_nowait() is not None
    assert taken == 5 * producers
    assert woken <= 2 * taken


def test_a_producer_is_not_woken_while_the_channel_is_still_full() -> None:
    """Taking one of many elements does not make room yet."""
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
    """A consumer sleeps only while its channel is empty, and one wake is enough for all that wait."""
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
    """A loop never waits for itself."""
    channel = Channel(capacity_records=1)
    assert channel.put_nowait(0, batch(1), nobody)
    assert channel.put_nowait(1, batch(2), nobody, force=True)
    assert drain(channel) == [(0, [1]), (1, [2])]


def test_close_drops_counts_and_wakes() -> None:
    """What a cancelled job leaves behind is counted, and no producer waits for ever."""
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
    """A producer behind a closed channel goes on, and its records are counted."""
    channel = Channel(capacity_records=1)
    channel.close()
    assert channel.put_nowait(0, batch(1, 2), nobody)
    assert channel.put_nowait(0, batch(3), nobody)
    assert channel.put_nowait(0, END_OF_STREAM, nobody)
    assert channel.undelivered == 3
    assert channel.get_nowait() is None


def test_what_is_in_flight_is_counted_exactly() -> None:
    """A loop is over exactly when nothing is on its way, with no guess about time."""
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
    """A loop ends also when one of its channels is closed with elements inside."""
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
    """After any puts and gets the channel holds what a plain queue with that bound would hold."""
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


def test_takes_in_as_many_bytes_as_the_bound() -> None:
    """Few large records fill a channel as many small ones do; an empty one takes in any."""
    channel = Channel(capacity_bytes=10_000)
    woken: list[str] = []
    assert channel.put_nowait(0, Batch([b"a" * 9_000]), nobody)
    assert not channel.put_nowait(0, Batch([b"b" * 9_000]), lambda: woken.append("b"))
    assert channel.put_nowait(0, Batch([b"c"]), nobody)
    assert 0.9 < channel.fill < 1
    channel.get_nowait()
    assert woken == ["b"]
    channel.get_nowait()
    assert channel.put_nowait(0, Batch([b"d" * 90_000]), nobody)
    assert not channel.put_nowait(0, Batch([b"e"]), nobody)
    assert channel.close() == 1
    assert channel.fill == 0


def test_a_batch_is_cut_at_the_bound_in_bytes() -> None:
    """What waits does not take more than the bound, however large the batches are that arrive."""
    channel = Channel(capacity_bytes=10_000)
    records = [bytes([number]) * 2_000 for number in range(12)]
    left: Element | None = Batch(records)
    taken: list[object] = []
    while left is not None:
        before, left = left, channel.put_portion(0, left, nobody)
        assert channel.fill <= 1
        if left is before:
            got = channel.get_nowait()
            assert got is not None
            taken += cast("Batch", got[1]).values
    while got := channel.get_nowait():
        taken += cast("Batch", got[1]).values
    assert taken == records


def test_a_counter_tells_of_zero_and_of_nothing_else() -> None:
    told: list[int] = []
    counter = InFlight()
    counter.when_zero(lambda: told.append(0))
    counter.add(2)
    counter.add(-1)
    assert told == []
    counter.add(-1)
    assert told == [0]


@pytest.mark.parametrize("way", ["puts by force", "gives up"])
def test_one_that_waits_no_more_takes_no_wake_up_of_another(way: str) -> None:
    woken: list[str] = []
    channel = Channel(capacity_records=1)
    channel.put_nowait(0, batch(1), nobody)
    wakes = [lambda name=name: woken.append(name) for name in "ab"]
    for wake in wakes:
        assert not channel.put_nowait(0, batch(9), wake)
    if way == "gives up":
        channel.give_up(wakes[0])
    else:
        assert channel.put_nowait(0, batch(9), wakes[0], force=True)
        channel.get_nowait()
    assert woken == []
    channel.get_nowait()
    assert woken == ["b"]


def test_a_channel_that_grows_wakes_the_first_that_waits() -> None:
    woken: list[str] = []
    channel = Channel(capacity_records=2)
    channel.put_nowait(0, batch(1, 2), nobody)
    assert not channel.put_nowait(0, batch(3), lambda: woken.append("a"))
    channel.resize(2)
    assert woken == []
    channel.resize(3)
    assert (woken, channel.capacity_records) == (["a"], 3)
    assert channel.put_nowait(0, batch(3), nobody)
    channel.resize(1)
    assert not channel.put_nowait(0, batch(4), nobody)


@pytest.mark.parametrize(
    ("capacity", "portion"), [(1, 1), (7, 1), (8, 1), (16, 2), (4095, 511), (4096, BATCH_RECORDS_MAX)]
)
def test_a_channel_is_filled_in_portions(capacity: int, portion: int) -> None:
    channel = Channel(capacity_records=capacity)
    assert channel.portion == portion


def test_a_batch_is_cut_where_it_is_put_and_the_rest_comes_back() -> None:
    channel = Channel(capacity_records=16)
    whole = batch(1, 2, 3)
    rest = channel.put_portion(0, whole, nobody)
    assert isinstance(rest, Batch)
    assert list(rest.values) == [3]
    assert channel.put_portion(0, rest, nobody) is None
    assert drain(channel) == [(0, [1, 2]), (0, [3])]
    assert channel.put_portion(0, batch(1, 2), nobody) is None
    assert channel.put_portion(0, whole, nobody, force=True) is None
    assert drain(channel) == [(0, [1, 2]), (0, [1, 2, 3])]
    channel.put_nowait(0, Batch(range(16)), nobody)
    assert channel.put_portion(0, whole, nobody) is whole
    assert channel.put_portion(0, END_OF_STREAM, nobody) is END_OF_STREAM
