"""Steps and channels reckon with the size of records."""

from __future__ import annotations

import threading

from sage import LocalEnvironment
from sage._runtime.pace import TimedPace
from sage.records import BATCH_BYTES_MAX, BATCH_RECORDS_MAX


def test_a_step_takes_fewer_large_records() -> None:
    """The next batch is of about the size that is wanted, and small records make full batches again."""
    pace = TimedPace()
    for _ in range(10):
        pace.measured(pace.limit(), 0.0)
    assert pace.limit() == BATCH_RECORDS_MAX
    pace.has_emitted(100, 100 * (BATCH_BYTES_MAX // 8))
    assert pace.limit() == 8
    pace.measured(8, 0.0)
    assert pace.limit() == 8
    pace.has_emitted(1, 10 * BATCH_BYTES_MAX)
    assert pace.limit() == 1
    for _ in range(10):
        pace.has_emitted(pace.limit(), 100)
        pace.measured(pace.limit(), 0.0)
    assert pace.limit() == BATCH_RECORDS_MAX


def test_a_read_asks_for_fewer_large_records_and_for_many_once_they_are_small() -> None:
    pace = TimedPace()

    def read(record_size: int) -> int:
        records = pace.read_limit()
        pace.has_read(records, 1.0, 1.0, records * record_size if records > 1 else None)
        pace.measured(records, 0.0)
        return records

    assert [read(10) for _ in range(10)][-1] == BATCH_RECORDS_MAX
    read(BATCH_BYTES_MAX // 8)
    assert {read(BATCH_BYTES_MAX // 8) for _ in range(10)} == {8}
    read(10 * BATCH_BYTES_MAX)
    assert {read(10 * BATCH_BYTES_MAX) for _ in range(10)} <= {1, 2}
    assert [read(10) for _ in range(20)][-1] == BATCH_RECORDS_MAX


def test_a_chain_without_a_queue_holds_few_large_records() -> None:
    """All in one task: no more are made in advance than a batch has."""
    alive: list[int] = [0]
    most: list[int] = [0]

    class Large:
        """Quick to make, as an array of zeros is."""

        nbytes = 1_000_000

        def __init__(self) -> None:
            alive[0] += 1

        def __del__(self) -> None:
            alive[0] -= 1

    def look(record: Large) -> int:
        most[0] = max(most[0], alive[0])
        return record.nbytes

    arrived: list[int] = []
    env = LocalEnvironment("large")
    env.from_batch(Large() for _ in range(3000)).map(look).map(int).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [1_000_000] * 3000
    assert most[0] <= 10


def test_few_large_records_wait_before_a_slow_task() -> None:
    """However fast they are made, what waits is bounded in bytes."""
    made: list[int] = []
    may_go = threading.Event()

    def make(number: int) -> bytes:
        made.append(number)
        return bytes(1_000_000)

    def hold(data: bytes) -> int:
        may_go.wait(30)
        return len(data)

    arrived: list[int] = []
    env = LocalEnvironment("large")
    env.from_batch(range(500)).map(make).map(hold, parallelism=2).sink(arrived.append)
    job = env.submit()
    seen = -1
    while seen < (seen := len(made)) or not made:
        threading.Event().wait(0.3)
    assert seen < 100
    may_go.set()
    job.wait(60)
    assert arrived == [1_000_000] * 500
