"""A stand-in for a Kafka server with transactions: `python kafka_broker.py PORT [USER PASSWORD]` runs it on loopback.

The mock cluster of librdkafka shows messages of transactions that were aborted, and fences nobody. This one keeps the
rules that readers and writers of transactions build on, in memory: messages of a transaction that is open are behind
the last stable offset, those of an aborted one are named in each answer, the offsets of a group come with the commit,
and a producer whose name another one has taken is refused. It makes a topic when it is asked to by the name
"make-NAME-PARTITIONS", drops the first messages of one by "drop-NAME-OFFSET", and a whole one by "gone-NAME".
"""

from __future__ import annotations

import socketserver
import struct
import sys
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

UNKNOWN_TOPIC, OUT_OF_RANGE, FENCED, BAD_PASSWORD = 3, 1, 47, 58
NAMES = ("make-", "drop-", "gone-")


def _table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    found = 0xFFFFFFFF
    for byte in data:
        found = TABLE[(found ^ byte) & 0xFF] ^ found >> 8
    return found ^ 0xFFFFFFFF


def control_batch(producer: int, epoch: int, is_commit: bool) -> bytes:
    """Return the mark by which a transaction ends in a partition."""
    key, value = struct.pack(">hh", 0, is_commit), struct.pack(">hi", 0, 0)
    record = bytes([0, 0, 0, len(key) * 2]) + key + bytes([len(value) * 2]) + value + b"\0"
    now = int(time.time() * 1_000)
    body = struct.pack(">hiqqqhii", 0x30, 0, now, now, producer, epoch, -1, 1) + bytes([len(record) * 2]) + record
    rest = struct.pack(">ibI", 0, 2, crc32c(body)) + body
    return struct.pack(">qi", 0, len(rest)) + rest


class Reader:
    """Takes the fields of a request."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        found = struct.unpack_from(f">{form}", self.data, self.at)
        self.at += struct.calcsize(f">{form}")
        return found[0] if len(found) == 1 else found

    def raw(self, size: int) -> bytes:
        self.at += max(size, 0)
        return self.data[self.at - max(size, 0) : self.at]

    def text(self) -> str:
        return self.raw(self.take("h")).decode()

    def block(self) -> bytes:
        return self.raw(self.take("i"))

    def many(self) -> range:
        return range(max(self.take("i"), 0))


def text(value: str | None) -> bytes:
    raw = (value or "").encode()
    return struct.pack(">h", -1 if value is None else len(raw)) + raw


def many(parts: list[bytes]) -> bytes:
    return struct.pack(">i", len(parts)) + b"".join(parts)


@dataclass
class Partition:
    """The batches of a partition by their first offsets, and its transactions."""

    batches: list[tuple[int, bytes]] = field(default_factory=list)
    low: int = 0
    high: int = 0
    open: dict[int, int] = field(default_factory=dict)
    aborted: list[tuple[int, int, int]] = field(default_factory=list)

    def append(self, batch: bytes) -> int:
        (last,) = struct.unpack_from(">i", batch, 23)
        first = self.high
        self.batches.append((first, struct.pack(">q", first) + batch[8:]))
        self.high += last + 1
        return first

    @property
    def stable(self) -> int:
        return min(self.open.values(), default=self.high)

    def end(self, producer: int, epoch: int, is_commit: bool) -> None:
        first = self.open.pop(producer, None)
        if first is not None:
            at = self.append(control_batch(producer, epoch, is_commit))
            if not is_commit:
                self.aborted.append((producer, first, at))


@dataclass
class Transaction:
    """A producer with a name."""

    producer: int
    epoch: int = -1
    parts: set[tuple[str, int]] = field(default_factory=set)
    offsets: dict[tuple[str, str, int], int] = field(default_factory=dict)


class Broker:
    """One server, which is a cluster."""

    def __init__(self, port: int, user: bytes) -> None:
        self.port, self.user = port, user
        self.changed = threading.Condition()
        self.topics: dict[str, list[Partition]] = {}
        self.transactions: dict[str, Transaction] = {}
        self.offsets: dict[tuple[str, str, int], int] = {}
        self.producers = 0

    def answer(self, key: int, version: int, ask: Reader) -> bytes:
        """Return the answer to a request."""
        with self.changed:
            found: bytes = APIS[key][0](self, ask, version)
            self.changed.notify_all()
            return found

    def part(self, topic: str, number: int) -> Partition | None:
        parts = self.topics.get(topic, [])
        return parts[number] if number < len(parts) else None

    def versions(self, ask: Reader, version: int) -> bytes:
        listed = [struct.pack(">hhh", key, least, most) for key, (_, least, most) in APIS.items()]
        return struct.pack(">h", 0 if version == 0 else 35) + many(listed)

    def metadata(self, ask: Reader, version: int) -> bytes:
        count = ask.take("i")
        asked = [ask.text() for _ in range(max(count, 0))]
        for name in asked:
            verb, _, rest = name.partition("-")
            if f"{verb}-" in NAMES:
                topic, _, number = rest.rpartition("-") if verb != "gone" else (rest, "", "0")
                if verb == "make":
                    self.topics.setdefault(topic, [Partition() for _ in range(int(number))])
                elif verb == "gone":
                    self.topics.pop(topic, None)
                else:
                    for part in self.topics[topic]:
                        part.low = min(int(number), part.high)
        listed = []
        for name in asked if count >= 0 else list(self.topics):
            parts = [
                struct.pack(">hii", 0, one, 1) + many([struct.pack(">i", 1)]) * 2
                for one in range(len(self.topics.get(name, ())))
            ]
            listed.append(
                struct.pack(">h", 0 if name in self.topics else UNKNOWN_TOPIC) + text(name) + b"\0" + many(parts)
            )
        node = struct.pack(">i", 1) + text("127.0.0.1") + struct.pack(">i", self.port) + text(None)
        return many([node]) + struct.pack(">i", 1) + many(listed)

    def coordinator(self, ask: Reader, version: int) -> bytes:
        found = text("127.0.0.1") + struct.pack(">i", self.port)
        return (
            (struct.pack(">ih", 0, 0) + text(None) if version else struct.pack(">h", 0)) + struct.pack(">i", 1) + found
        )

    def begin_producer(self, ask: Reader, version: int) -> bytes:
        """Give a producer its number, and end what the one before it has begun."""
        name = ask.text()
        if not name:
            self.producers += 1
            return struct.pack(">ihqh", 0, 0, self.producers, 0)
        if name not in self.transactions:
            self.producers += 1
            self.transactions[name] = Transaction(self.producers)
        found = self.transactions[name]
        self.end(found, False)
        found.epoch += 1
        return struct.pack(">ihqh", 0, 0, found.producer, found.epoch)

    def end(self, found: Transaction, is_commit: bool) -> None:
        for topic, number in found.parts:
            part = self.part(topic, number)
            if part is not None:
                part.end(found.producer, found.epoch, is_commit)
        if is_commit:
            self.offsets |= found.offsets
        found.parts, found.offsets = set(), {}

    def owner(self, ask: Reader) -> tuple[Transaction, int]:
        """Return the transaction of a request, and the error for a producer whose name another one has."""
        found = self.transactions[ask.text()]
        producer, epoch = ask.take("qh")
        return found, 0 if (producer, epoch) == (found.producer, found.epoch) else FENCED

    def add_partitions(self, ask: Reader, version: int) -> bytes:
        found, error = self.owner(ask)
        listed = []
        for _ in ask.many():
            topic = ask.text()
            numbers = [ask.take("i") for _ in ask.many()]
            if not error:
                found.parts |= {(topic, number) for number in numbers}
            listed.append(text(topic) + many([struct.pack(">ih", number, error) for number in numbers]))
        return struct.pack(">i", 0) + many(listed)

    def add_group(self, ask: Reader, version: int) -> bytes:
        return struct.pack(">ih", 0, self.owner(ask)[1])

    def end_transaction(self, ask: Reader, version: int) -> bytes:
        found, error = self.owner(ask)
        if not error:
            self.end(found, ask.take("?"))
        return struct.pack(">ih", 0, error)

    def commit_offsets(self, ask: Reader, version: int) -> bytes:
        name, group = ask.text(), ask.text()
        found = self.transactions[name]
        error = 0 if ask.take("qh") == (found.producer, found.epoch) else FENCED
        listed = []
        for _ in ask.many():
            topic, parts = ask.text(), []
            for _ in ask.many():
                number, offset = ask.take("iq")
                ask.text()
                if not error:
                    found.offsets[group, topic, number] = offset
                parts.append(struct.pack(">ih", number, error))
            listed.append(text(topic) + many(parts))
        return struct.pack(">i", 0) + many(listed)

    def find_offsets(self, ask: Reader, version: int) -> bytes:
        group, listed = ask.text(), []
        for _ in ask.many():
            topic = ask.text()
            numbers = [ask.take("i") for _ in ask.many()]
            found = [(number, self.offsets.get((group, topic, number), -1)) for number in numbers]
            listed.append(
                text(topic) + many([struct.pack(">iq", *one) + text("") + struct.pack(">h", 0) for one in found])
            )
        return many(listed)

    def take_messages(self, ask: Reader, version: int) -> bytes:
        ask.text()
        ask.take("hi")
        listed = []
        for _ in ask.many():
            topic, parts = ask.text(), []
            for _ in ask.many():
                number = ask.take("i")
                error, first = self.produce(topic, number, ask.block())
                parts.append(struct.pack(">ihqq", number, error, first, -1))
            listed.append(text(topic) + many(parts))
        return many(listed) + struct.pack(">i", 0)

    def produce(self, topic: str, number: int, batch: bytes) -> tuple[int, int]:
        part = self.part(topic, number)
        if part is None:
            return UNKNOWN_TOPIC, -1
        (attributes,) = struct.unpack_from(">h", batch, 21)
        producer, epoch = struct.unpack_from(">qh", batch, 43)
        if attributes & 0x10:
            (found,) = (one for one in self.transactions.values() if one.producer == producer)
            if epoch != found.epoch or (topic, number) not in found.parts:
                return FENCED, -1
            part.open.setdefault(producer, part.high)
        return 0, part.append(batch)

    def list_offsets(self, ask: Reader, version: int) -> bytes:
        ask.take("i")
        is_committed = version >= 2 and ask.take("b") == 1
        listed = []
        for _ in ask.many():
            topic, parts = ask.text(), []
            for _ in ask.many():
                number, at = ask.take("iq")
                part = self.part(topic, number)
                last = 0 if part is None else part.stable if is_committed else part.high
                offset = -1 if part is None else part.low if at == -2 else last
                parts.append(struct.pack(">ihqq", number, UNKNOWN_TOPIC if part is None else 0, -1, offset))
            listed.append(text(topic) + many(parts))
        return (struct.pack(">i", 0) if version >= 2 else b"") + many(listed)

    def give_messages(self, ask: Reader, version: int) -> bytes:
        _, wait_ms, _, _, level = ask.take("iiiib")
        asked = []
        for _ in ask.many():
            topic = ask.text()
            asked += [(topic, *ask.take("iqi")[:2]) for _ in ask.many()]
        due = time.monotonic() + wait_ms / 1_000
        while True:
            found = [self.fetch(topic, number, offset, level == 1) for topic, number, offset in asked]
            left_s = due - time.monotonic()
            if any(is_ready for _, is_ready in found) or left_s <= 0:
                listed = [text(topic) + many([one]) for (topic, *_), (one, _) in zip(asked, found, strict=True)]
                return struct.pack(">i", 0) + many(listed)
            self.changed.wait(left_s)

    def fetch(self, topic: str, number: int, offset: int, is_committed: bool) -> tuple[bytes, bool]:
        part = self.part(topic, number)
        if part is None or not part.low <= offset <= part.high:
            error = UNKNOWN_TOPIC if part is None else OUT_OF_RANGE
            return struct.pack(">ihqqii", number, error, -1, -1, -1, 0), True
        end = part.stable if is_committed else part.high
        begin = max(0, bisect_left(part.batches, (offset + 1, b"")) - 1)
        found = [batch for first, batch in part.batches[begin : begin + 50] if first < end]
        gone = [struct.pack(">qq", one, first) for one, first, last in part.aborted if is_committed and last >= offset]
        data = b"".join(found if offset < end else [])
        head = struct.pack(">ihqq", number, 0, part.high, part.stable) + many(gone)
        return head + struct.pack(">i", len(data)) + data, bool(data)

    def logins(self, ask: Reader, version: int) -> bytes:
        return struct.pack(">h", 0) + many([text("PLAIN")])

    def log_in(self, ask: Reader, version: int) -> bytes:
        error = 0 if ask.block() == self.user else BAD_PASSWORD
        return struct.pack(">h", error) + text("the password is wrong" if error else None) + struct.pack(">i", 0)


APIS: dict[int, tuple[Callable[[Broker, Reader, int], bytes], int, int]] = {
    0: (Broker.take_messages, 3, 3),
    1: (Broker.give_messages, 4, 4),
    2: (Broker.list_offsets, 1, 2),
    3: (Broker.metadata, 1, 1),
    9: (Broker.find_offsets, 1, 1),
    10: (Broker.coordinator, 0, 1),
    17: (Broker.logins, 1, 1),
    18: (Broker.versions, 0, 0),
    22: (Broker.begin_producer, 0, 0),
    24: (Broker.add_partitions, 0, 0),
    25: (Broker.add_group, 0, 0),
    26: (Broker.end_transaction, 0, 0),
    28: (Broker.commit_offsets, 0, 0),
    36: (Broker.log_in, 0, 0),
}
"""The requests by their keys in the protocol, each with the versions that are understood."""


class Connection(socketserver.StreamRequestHandler):
    """Answers the requests of a client, one after the other."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while size := self.rfile.read(4):
            ask = Reader(self.rfile.read(int.from_bytes(size)))
            key, version, id_ = ask.take("hhi")
            ask.text()
            reply = struct.pack(">i", id_) + broker.answer(key, version, ask)
            self.wfile.write(len(reply).to_bytes(4) + reply)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True

    def handle_error(self, request: Any, address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, address)


if __name__ == "__main__":
    broker = Broker(int(sys.argv[1]), b"\0" + "\0".join(sys.argv[2:]).encode())
    with Server(("127.0.0.1", broker.port), Connection) as server:
        print("ready", flush=True)
        server.serve_forever()
