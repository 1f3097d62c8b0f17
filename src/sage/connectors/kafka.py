"""Kafka: messages of a topic as records, and records as messages of one transaction with their checkpoint."""

from __future__ import annotations

import logging
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from sage._arguments import check_seconds, check_text
from sage._extras import load
from sage.connectors.brokers import FORMATS, POLL_S, BrokerSink, BrokerSource, check_choice, decode, encode
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    import confluent_kafka as kafka

logger = logging.getLogger(__name__)

Setting = str | int | float | bool
Raw = tuple[bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...], int]
"""A message to be written: value, key, headers and timestamp, which is 0 for now."""

OWN = {
    "bootstrap.servers": "servers=",
    "group.id": "the checkpoint, which has the offsets",
    "transactional.id": "the name of the job",
    "enable.auto.commit": "the checkpoint, which has the offsets",
    "enable.auto.offset.store": "the checkpoint, which has the offsets",
    "enable.partition.eof": "follow=",
    "auto.offset.reset": "begin= and lost=",
    "isolation.level": "the connector, which reads messages that are committed",
}
"""Settings of the library that the connectors need for themselves, and who has a say in them."""
SECRET = ("password", "secret", "sasl.oauthbearer.config", "ssl.key.pem")
MESSAGE_BYTES_MAX = 1_000_000
MESSAGE_BYTES_MORE = 512
"""Room for a message's own fields, and a header's."""
TIMESTAMP_MAX_MS = (1 << 63) - 1
SHOWN_MAX = 10
LOOK_READS = 20
"""After so many reads without a message, a source looks whether its topic is still there."""


@dataclass(frozen=True, slots=True)
class KafkaRecord:
    """A message of a topic.

    Attributes:
        value: None is a tombstone, which deletes the key from a compacted topic.
        key: messages with one key are in one partition, in order.
        headers: names and values.
        timestamp_ms: milliseconds since 1970; None for a message that the sink writes now.
        partition: where it was read; a sink does not look at it.
        offset: its place in the partition; a sink does not look at it.
    """

    value: Any
    key: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp_ms: int | None = None
    partition: int = -1
    offset: int = -1


class _Quiet:
    """Takes the library's lines: it goes on after most errors in them, and the connectors raise the others."""

    def log(self, level: int, text: str, *args: object) -> None:  # noqa: ARG002
        """Log a line for those who look closely."""
        logger.debug(text, *args)


class _Cluster:
    """The servers of one connector: its settings, errors that name it, and its topic."""

    def __init__(
        self, owner: str, servers: str, topic: str, settings: Mapping[str, Setting] | None, timeout_s: float
    ) -> None:
        load("confluent_kafka", "kafka")
        check_text(f"{owner}: servers", servers, f'Name them: {owner}("localhost:9092", "orders").')
        check_text(f"{owner}: topic", topic, f'Give its name: {owner}("localhost:9092", "orders").')
        check_seconds(f"{owner}: timeout_s is", timeout_s, may_be_zero=False)
        for name in settings or {}:
            if name in OWN:
                raise hint(GraphError(f'{owner}: "{name}" is in settings'), f"It is set by {OWN[name]}.")
        self.topic = topic
        self.timeout_s = timeout_s
        self.place = f'topic "{topic}" at "{servers}"'
        self.is_down = False
        self._last = ""
        self._settings: dict[str, Setting] = {**(settings or {}), "bootstrap.servers": servers}
        self._secrets = [str(value) for name, value in self._settings.items() if name.endswith(SECRET) and value]

    @property
    def package(self) -> ModuleType:
        """The package `confluent_kafka`; not an attribute, as a sink is copied for each task."""
        return load("confluent_kafka", "kafka")

    def settings(self, **more: Setting) -> dict[str, object]:
        """Return the settings of a client."""
        named = {name.replace("_", "."): value for name, value in more.items()}
        return {**named, **self._settings, "error_cb": self._note, "logger": _Quiet()}

    def limit(self) -> int:
        """Return how many bytes a message may have."""
        return int(self._settings.get("message.max.bytes", MESSAGE_BYTES_MAX))

    def _note(self, error: kafka.KafkaError) -> None:
        """Remember an error that the library goes on after; what follows it says only that time is over."""
        if error.code() == self.package.KafkaError._ALL_BROKERS_DOWN:
            self.is_down = True
        else:
            self._last = error.str()

    def failure(self, error: object) -> ConnectorError:
        """Return an error that names the topic, without secrets."""
        last = f" (before: {self._last})" if self._last else ""
        text = f"{self.place}: {error}{last}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        note = "Are the servers running, and are names and passwords in settings= right?"
        return hint(ConnectorError(text, fault="external"), note)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors name the topic."""
        try:
            yield
        except self.package.KafkaException as error:
            found = error.args[0]
            text = found.str() if isinstance(found, self.package.KafkaError) else describe(error)
            raise self.failure(text) from None  # it may show a setting

    def partitions(self, client: kafka.Consumer | kafka.Producer, topic: str | None = None) -> list[int]:
        """Return the numbers of the topic's partitions, from a look at all topics or at this one.

        Servers may make a topic that a producer asks for by its name.

        Raises:
            ConnectorError: the topic is not there.
        """
        try:
            look = partial(client.list_topics, timeout=self.timeout_s)
            topics = (look(topic) if topic else look()).topics
            if self.topic not in topics or topics[self.topic].error is not None:
                topics = look().topics
        except self.package.KafkaException:
            if not self.is_down:
                client.poll(0.0)  # calls `_note`
            raise
        self.is_down = False
        if self.topic not in topics:
            more = "" if len(topics) <= SHOWN_MAX else f" and {len(topics) - SHOWN_MAX} more"
            there = ", ".join(islice(sorted(topics), SHOWN_MAX)) or "none"
            raise hint(ConnectorError(f"{self.place} is not there", fault="external"), f"There are: {there}{more}.")
        return sorted(topics[self.topic].partitions)


class KafkaTopic(BrokerSource["kafka.Message", KafkaRecord]):
    """Reads the messages of a topic, in order within each partition.

    It reads up to the messages that were there when it was opened, or goes on for ever. The checkpoint of a durable job
    has the offset of each partition; no consumer group is used or changed. Messages of transactions that were aborted
    are not read. A partition that is added later is read from its first message.

    Args:
        servers: "host:port" of one or more servers, separated by commas.
        topic: its name.
        format: of values: "json", "text" or "bytes".
        follow: whether to go on when all messages have been read.
        begin: where to begin without a position: "earliest" or "latest".
        lost: where to go on if the topic has dropped messages that were not read: "earliest", "latest", or "fail".
        bad_values: "fail", or "skip" to leave out values that are not in the format, and count them.
        settings: further settings of the library librdkafka, such as {"security.protocol": "SASL_SSL"}.
        timeout_s: bound of each question to the servers, in seconds.
    """

    def __init__(
        self,
        servers: str,
        topic: str,
        *,
        format: str = "json",
        follow: bool = False,
        begin: str = "earliest",
        lost: str = "fail",
        bad_values: str = "fail",
        settings: Mapping[str, Setting] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(follow=follow, begin=begin, lost=lost, bad_values=bad_values)
        check_choice("KafkaTopic: format", format, FORMATS)
        self._format = format
        self._cluster = _Cluster("KafkaTopic", servers, topic, settings, timeout_s)
        self._consumer: kafka.Consumer | None = None
        self._offsets: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._empty_reads = 0

    def open(self, position: dict[int, int] | None = None) -> None:
        """Find the topic, and look whether it has the position.

        Raises:
            ConnectorError: the servers or the topic are not there, or the topic does not have the position any more.
        """
        cluster = self._cluster
        self._left.clear()
        self._offsets, self._ends = dict(position or {}), {}
        with cluster.naming():
            # The name of a group has to be given, and is not used.
            consumer = self._consumer = cluster.package.Consumer(
                cluster.settings(
                    group_id="sage",
                    enable_auto_commit=False,
                    enable_auto_offset_store=False,
                    enable_partition_eof=True,
                    auto_offset_reset="error" if self._lost == "fail" else self._lost,
                    isolation_level="read_committed",
                )
            )
            for partition in cluster.partitions(consumer, cluster.topic):
                place = cluster.package.TopicPartition(cluster.topic, partition)
                low, high = consumer.get_watermark_offsets(place, timeout=cluster.timeout_s)
                begin = low if self._begin == "earliest" or position is not None else high
                offset = self._offsets.setdefault(partition, begin)
                if not low <= offset <= high:
                    if self._lost == "fail":
                        text = f"{cluster.place}, partition {partition} has the offsets {low:,} to {high:,}"
                        raise self._gone(f"{text}, and {offset:,} is next")
                    self._offsets[partition] = low if self._lost == "earliest" else high
                self._ends[partition] = high
            for partition in set(self._offsets) - set(self._ends):
                text = f"{cluster.place} had a partition {partition}, and has {len(self._ends)} partitions now"
                if self._lost == "fail":
                    raise self._gone(text)
                del self._offsets[partition]
            if not self._follows:
                self._ends = {one: end for one, end in self._ends.items() if self._offsets[one] < end}
            consumer.assign(
                [cluster.package.TopicPartition(cluster.topic, one, self._offsets[one]) for one in self._ends]
            )

    def _fetch(self, records_max: int) -> list[kafka.Message] | None:
        if not self._ends:
            return None
        assert self._consumer is not None
        with self._cluster.naming():
            found: list[kafka.Message] = self._consumer.consume(records_max, 0.0) or self._consumer.consume(1, POLL_S)
            self._empty_reads = 0 if found else self._empty_reads + 1
            if not found and (self._cluster.is_down or self._empty_reads % LOOK_READS == 0):
                # The library waits for servers and topics for ever.
                self._cluster.partitions(self._consumer, self._cluster.topic)
        return found

    def _records(self, message: kafka.Message) -> Iterator[KafkaRecord]:
        partition, offset = message.partition(), message.offset()
        assert partition is not None
        assert offset is not None
        error = message.error()
        if error is not None:
            if error.code() == self._cluster.package.KafkaError._PARTITION_EOF:
                return
            self._left.popleft()  # it tells it once; a retry goes on
            if error.code() == self._cluster.package.KafkaError._AUTO_OFFSET_RESET:
                raise self._gone(f"{self._cluster.place}, partition {partition}: offset {offset:,} is gone")
            raise self._cluster.failure(error.str())
        if partition not in self._ends or (not self._follows and offset >= self._ends[partition]):
            return
        raw = message.value()
        yield KafkaRecord(
            value=None if raw is None else decode(self._format, raw),
            key=message.key(),
            headers=tuple(cast("list[tuple[str, bytes | None]]", message.headers() or [])),
            timestamp_ms=message.timestamp()[1],
            partition=partition,
            offset=offset,
        )

    def _pass(self, message: kafka.Message) -> None:
        partition, offset = message.partition(), message.offset()
        assert partition is not None
        assert offset is not None
        end = self._ends.get(partition)
        if end is None:
            return
        is_end = message.error() is not None
        if self._follows or offset < end or is_end:
            # The end may be behind marks of transactions, which are not messages.
            self._offsets[partition] = offset if is_end else offset + 1
        if not self._follows and (is_end or offset + 1 >= end):
            del self._ends[partition]
            assert self._consumer is not None
            self._consumer.incremental_unassign([self._cluster.package.TopicPartition(self._cluster.topic, partition)])

    def _place(self, message: kafka.Message) -> str:
        return f"{self._cluster.place}, partition {message.partition()}, offset {message.offset():,}"

    def position(self) -> dict[int, int]:
        """Return the next offset of each partition."""
        return dict(self._offsets)

    def close(self) -> None:
        """Close the connections."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()


class KafkaSink(BrokerSink[Raw]):
    """Writes records as messages of a topic; those of a checkpoint appear in one transaction, and exactly once.

    They do so for readers that take committed messages only, as `KafkaTopic` does, and other clients with
    `isolation.level=read_committed`. The messages of a checkpoint are in memory and in the checkpoint until then. The
    same transaction notes the number of the checkpoint as the offset of a consumer group with the name of the task, so
    that the servers say which checkpoint they have. They forget it a while after the last commit, by default seven
    days; a job that was killed in a commit and is run again later than that is refused.

    Args:
        servers: "host:port" of one or more servers, separated by commas.
        topic: its name.
        format: of values: "json", "text" or "bytes". A `KafkaRecord` has the key and headers of its message, too.
        key: returns the key of a record that is not a `KafkaRecord`, as bytes or a string; None for any partition.
        settings: further settings of the library librdkafka, such as {"security.protocol": "SASL_SSL"}.
        timeout_s: bound of each question to the servers, and of a commit, in seconds.
    """

    promise = "each record exactly once, if it is read with isolation.level=read_committed"

    def __init__(
        self,
        servers: str,
        topic: str,
        *,
        format: str = "json",
        key: Callable[[Any], object] | None = None,
        settings: Mapping[str, Setting] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__()
        check_choice("KafkaSink: format", format, FORMATS)
        if key is not None and not callable(key):
            raise hint(GraphError(f"KafkaSink: key is {short(key)}"), 'Give a function: key=lambda row: row["user"].')
        self._format = format
        self._key = key
        self._cluster = _Cluster("KafkaSink", servers, topic, settings, timeout_s)
        self._producer: kafka.Producer | None = None
        self._group: object = None
        self._checkpoint = 0
        self._known: int | None = None

    def open(self, part: str, checkpoint: int) -> None:
        """Find the topic, end what an earlier program has left, and look which checkpoint the servers have.

        Raises:
            ConnectorError: the servers or the topic are not there, or it has messages of a later checkpoint.
        """
        cluster, name = self._cluster, f"sage-{part}"
        self._checkpoint = checkpoint
        with cluster.naming():
            producer = self._producer = cluster.package.Producer(cluster.settings(transactional_id=name))
            cluster.partitions(producer)
            producer.init_transactions(cluster.timeout_s)
            if not self.durable:
                return
            reader = cluster.package.Consumer(
                cluster.settings(group_id=name, enable_auto_commit=False, isolation_level="read_committed")
            )
            try:
                (found,) = reader.committed([self._mark(0)], timeout=cluster.timeout_s)
                self._group = reader.consumer_group_metadata()
            finally:
                reader.close()
            if found.error is not None:
                raise cluster.failure(found.error.str())
        self._known = found.offset if found.offset >= 0 else None
        if self._known is not None and self._known > checkpoint:
            raise self._later(cluster.place, self._known, checkpoint)

    def _mark(self, number: int) -> kafka.TopicPartition:
        mark: kafka.TopicPartition = self._cluster.package.TopicPartition(self._cluster.topic, 0, number)
        return mark

    def begin(self) -> None:
        """Let the servers know the task, so that a checkpoint that they do not know later was forgotten."""
        if self.durable and self._known is None:
            self._write(self._checkpoint, [])

    def _raw(self, record: object) -> Raw:
        if not isinstance(record, KafkaRecord):
            record = KafkaRecord(record, _octets("key", self._key(record), record) if self._key else None)
        value = None if record.value is None else encode(self._format, record.value, record.value)
        key, headers = _octets("key", record.key, record), _headers(record)
        timestamp_ms: object = record.timestamp_ms or 0
        size = len(value or b"") + len(key or b"") + MESSAGE_BYTES_MORE
        size += sum(len(name) + len(held or b"") + MESSAGE_BYTES_MORE for name, held in headers)
        if size > self._cluster.limit():
            error = ConnectorError(f"record {short(record.value)} has about {size:,} bytes as a message")
            raise hint(error, 'Make it smaller, or let topic and library take it: settings={"message.max.bytes": ...}.')
        if not isinstance(timestamp_ms, int) or not -1 <= timestamp_ms <= TIMESTAMP_MAX_MS:
            error = ConnectorError(f"record {short(record)} has the time {short(timestamp_ms)}")
            raise hint(error, "Give milliseconds since 1970, or None for the time at which it is written.")
        return value, key, headers, timestamp_ms

    def commit(self, token: tuple[int, list[Raw]]) -> None:
        """Write the messages in one transaction, unless the servers have this checkpoint.

        Raises:
            ConnectorError: it failed, and the next run tries again; or nobody knows whether it was done.
        """
        number, messages = token
        if self.durable and self._known is None:
            text = f"{self._cluster.place}: the servers do not know any more whether they have checkpoint {number}"
            note = "They forget it after offsets.retention.minutes. Look for its records in the topic; "
            raise hint(ConnectorError(text, fault="external"), f'{note}submit(resume="never") begins anew.')
        if self._known is None or number > self._known:
            self._write(number, messages)

    def _write(self, number: int, messages: Sequence[Raw]) -> None:
        cluster, producer = self._cluster, self._producer
        assert producer is not None
        with cluster.naming():
            producer.begin_transaction()
            try:
                for message in messages:
                    try:
                        self._produce(producer, message)
                    except BufferError:
                        producer.flush(cluster.timeout_s)
                        self._produce(producer, message)
                if self.durable:
                    producer.send_offsets_to_transaction([self._mark(number)], self._group, cluster.timeout_s)
                producer.commit_transaction(cluster.timeout_s)
            except (cluster.package.KafkaException, BufferError):
                self._drop(producer)
                raise
        self._known = number if self.durable else None

    def _produce(self, producer: kafka.Producer, message: Raw) -> None:
        value, key, headers, timestamp = message
        producer.produce(self._cluster.topic, value, key, headers=list(headers), timestamp=timestamp)

    def _drop(self, producer: kafka.Producer) -> None:
        """Abort the transaction if that can be done; the next program's start does it otherwise."""
        try:
            producer.purge()
            producer.abort_transaction(self._cluster.timeout_s)
        except self._cluster.package.KafkaException as error:
            logger.debug("transaction not aborted: %s", error)

    def close(self) -> None:
        """Close the connections."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()
            with suppress(self._cluster.package.KafkaException):  # the last one, which was raised
                producer.close()


def _octets(label: str, given: object, record: object) -> bytes | None:
    """Return a key or the value of a header as it is written; the library would refuse others within the commit."""
    if isinstance(given, str):
        with suppress(UnicodeEncodeError):
            return given.encode()
    elif given is None or isinstance(given, bytes):
        return given
    error = ConnectorError(f"record {short(record)} has the {label} {short(given)}")
    raise hint(error, "It is bytes, None, or a string that UTF-8 has.")


def _headers(record: KafkaRecord) -> tuple[tuple[str, bytes | None], ...]:
    """Return the headers as they are written; the library ends the process at a name that UTF-8 does not have."""
    given: object = record.headers
    headers = []
    for pair in given if isinstance(given, tuple | list) else [given]:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            error = ConnectorError(f"record {short(record)} has the headers {short(given)}")
            raise hint(error, 'Give pairs: headers=(("name", b"value"),).')
        _octets("header", pair[0], record)
        headers.append((pair[0], _octets("header", pair[1], record)))
    return tuple(headers)
