"""What a task reads may be cut short by another thread at any moment."""

from __future__ import annotations

import sys
import threading

from sage.records import BatchReading

RECORDS = list(range(500))


def test_every_record_is_read_or_left_once_whenever_it_is_cut() -> None:
    span = BatchReading()
    over = threading.Event()
    cuts = 0

    def cut_again_and_again() -> None:
        while not over.is_set():
            span.cut()

    cutting = threading.Thread(target=cut_again_and_again)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads take turns within a batch
    cutting.start()
    try:
        for _ in range(2_000):
            read = []
            for record in span.begin(RECORDS):
                read.append(record)
            left = span.end()
            assert read + left == RECORDS
            cuts += bool(left)
    finally:
        over.set()
        cutting.join()
        sys.setswitchinterval(interval_s)
    assert cuts, "the other thread never cut anything, so nothing was shown"


def test_the_rest_is_known_after_a_record_that_failed() -> None:
    span = BatchReading()
    for record in span.begin([1, 2, 3, 4]):
        if record == 2:
            break
    assert span.end() == [3, 4]


def test_a_cancelled_span_gives_nothing() -> None:
    span = BatchReading()
    span.cancelled = True
    assert list(span.begin([1, 2])) == []
    assert span.end() == [1, 2]
