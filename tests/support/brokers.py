"""Servers of the tests' own for topics and streams, and a topic or stream in them for each folder."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sage import Line, LocalEnvironment
from sage.connectors import KafkaTopic, RedisStream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REDIS_SERVER = shutil.which("redis-server")
PASSWORD = "open/sesame: 7@8%"
IN_URL = "open%2Fsesame%3A%207%408%25"
PARTITIONS = 3

needs_kafka = pytest.mark.skipif(find_spec("confluent_kafka") is None, reason="the package confluent-kafka is missing")
needs_redis = pytest.mark.skipif(
    REDIS_SERVER is None or find_spec("redis") is None, reason="redis-server or the package redis is not installed"
)

_running = ExitStack()
_addresses: dict[str, str] = {}
_names: dict[Path, str] = {}


def _started(kind: str, *words: str, line: str) -> str:
    """Return "host:port" of a server, which is started by the first who asks."""
    if kind not in _addresses:
        env = _running.enter_context(LocalEnvironment(kind))
        server = env.register_command(kind, list(words), ready=Line(line), url="127.0.0.1:{port}")
        urls: list[str] = []
        env.from_batch([1]).map(lambda _: server.url).sink(urls.append)
        env.submit(autostop=True, keep_services=True)
        (_addresses[kind],) = urls
    return _addresses[kind]


def kafka(*user: str) -> str:
    """Return the address of a Kafka server, or of one that wants a name and a password."""
    program = str(Path(__file__).with_name("kafka_broker.py"))
    return _started("kafka" + "-user" * bool(user), sys.executable, program, "{port}", *user, line="ready")


def redis(database: int = 0, user: str = f":{IN_URL}@") -> str:
    """Return the address of a Redis server."""
    words = ("--port", "{port}", "--bind", "127.0.0.1", "--dir", "{folder}", "--save", "", "--requirepass", PASSWORD)
    return f"redis://{user}{_started('redis', str(REDIS_SERVER), *words, line='Ready to accept')}/{database}"


def stop() -> None:
    """Stop the servers that somebody has started."""
    _running.close()
    _addresses.clear()


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def ask(command: str, servers: str = "") -> None:
    """Let the Kafka server make a topic, or drop messages or a topic, by the name that it is asked for."""
    host, _, port = (servers or kafka()).partition(":")
    name = command.encode()
    asked = struct.pack(">hhihih", 3, 3, 0, -1, 1, len(name)) + name
    with socket.create_connection((host, int(port)), timeout=10.0) as connection:
        connection.sendall(len(asked).to_bytes(4) + asked)
        assert connection.recv(4)


def stream(folder: Path) -> str:
    """Return the name of the folder's stream."""
    return _names.setdefault(folder, f"of {os.fspath(folder.name)} {len(_names)}")


def topic(folder: Path, *, has_to_be_there: bool = True) -> str:
    """Return the name of the folder's topic."""
    name = _names.setdefault(folder, f"topic-{len(_names)}")
    if has_to_be_there:
        ask(f"make-{name}-{PARTITIONS}")
    return name


def share(folder: Path, other: Path) -> None:
    """Let another folder have the same: transactions are not there until their commit."""
    _names[other] = _names[folder]


def produce(topic: str, values: Sequence[bytes | None], **options: Any) -> None:
    """Write messages that belong to no transaction."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": kafka()})
    for number, value in enumerate(values):
        producer.produce(topic, value, **{"partition": number % PARTITIONS, **options})
    assert producer.flush(10.0) == 0
    producer.close()


def add(stream: str, entries: Sequence[Mapping[Any, Any]]) -> None:
    """Add entries."""
    import redis as library

    with library.Redis.from_url(redis()) as client:
        for entry in entries:
            client.xadd(stream, dict(entry))


class KafkaValues(KafkaTopic):
    """The values alone, as sources that know no more give them."""

    def read(self, records_max: int) -> Any:
        found = super().read(records_max)
        return None if found is None else [record.value for record in found]


class RedisValues(RedisStream):
    """The fields alone."""

    def read(self, records_max: int) -> Any:
        found = super().read(records_max)
        return None if found is None else [record.fields for record in found]
