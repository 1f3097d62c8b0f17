"""A channel lets a barrier through when all producers have sent it, and holds back those that are ahead."""

from __future__ import annotations

from typing import Any

from sage._runtime.aligning_channel import AligningChannel
from sage.records import END_OF_STREAM, Barrier, Batch


class Producer:
    def __init__(self, channel: AligningChannel) -> None:
        self.channel = channel
        self.woken = 0
        channel.producers += 1

    def wake(self) -> None:
        self.woken += 1

    def put(self, element: Any) -> bool:
        return self.channel.put_nowait(0, element, self.wake)


def channel(capacity: int = 100) -> AligningChannel:
    return AligningChannel(capacity, now=lambda: 0.0)


def taken(joined: AligningChannel) -> list[Any]:
    """Take everything out: values of batches, numbers of barriers as negative, and ends as None."""
    found: list[Any] = []
    while True:
        number = joined.take_barrier()
        if number is not None:
            found.append(-number)
            continue
        element = joined.get_nowait()
        if element is None:
            return found
        found += element[1].values if isinstance(element[1], Batch) else [None]


def test_records_behind_a_barrier_come_after_that_of_the_slowest() -> None:
    joined = channel()
    fast, slow = Producer(joined), Producer(joined)
    fast.put(Batch([1]))
    fast.put(Barrier(7))
    fast.put(Batch([2]))
    slow.put(Batch([3]))
    assert taken(joined) == [1, 3]
    slow.put(Barrier(7))
    slow.put(Batch([4]))
    assert taken(joined) == [-7, 2, 4]


def test_what_is_held_back_does_not_use_up_the_room_of_those_behind() -> None:
    joined = channel(capacity=2)
    fast, slow = Producer(joined), Producer(joined)
    fast.put(Barrier(1))
    assert fast.put(Batch([1, 2]))
    assert not fast.put(Batch([3]))
    assert slow.put(Batch([4, 5]))
    assert not slow.put(Batch([6]))
    assert taken(joined) == [4, 5]
    assert slow.put(Batch([6]))
    assert (fast.woken, slow.woken) == (0, 1)
    slow.put(Barrier(1))
    assert fast.woken == 1
    assert taken(joined) == [6, -1, 1, 2]
    assert fast.put(Batch([3]))


def test_a_producer_that_ends_is_not_waited_for() -> None:
    joined = channel()
    first, second, third = Producer(joined), Producer(joined), Producer(joined)
    first.put(END_OF_STREAM)
    second.put(Barrier(1))
    second.put(END_OF_STREAM)
    third.put(Batch([1]))
    assert taken(joined) == [None, 1]
    third.put(END_OF_STREAM)
    assert taken(joined) == [None, -1, None]


def test_two_streams_of_one_producer_send_two_barriers() -> None:
    joined = channel()
    both = Producer(joined)
    joined.producers += 1
    both.put(Barrier(1))
    assert taken(joined) == []
    both.put(Barrier(1))
    both.put(Batch([1]))
    assert taken(joined) == [-1, 1]


def test_only_who_asks_for_barriers_gets_one() -> None:
    joined = channel()
    Producer(joined).put(Barrier(1))
    assert joined.get_nowait() is None
    assert joined.take_barrier() == 1


def test_a_closed_channel_wakes_whoever_is_held_up() -> None:
    joined = channel(capacity=1)
    fast, _ = Producer(joined), Producer(joined)
    fast.put(Barrier(1))
    assert fast.put(Batch([1]))
    assert not fast.put(Batch([2]))
    assert joined.close() == 1
    assert fast.woken == 1
    assert fast.put(Batch([2]))
    assert joined.undelivered == 1
