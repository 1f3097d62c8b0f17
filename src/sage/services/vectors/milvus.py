"""Vectors in Milvus: Milvus Lite in this process, or a server."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from sage._extras import load
from sage.errors import ServiceError, ServiceUnavailableError, hint, short
from sage.services._shared.address import basic_auth, is_here, redact_url, resolved, split_credentials
from sage.services._shared.locks import FolderLock
from sage.services._shared.secret import redact, redacted_cause
from sage.services.vectors.contract import Entry, Hit, Shape, VectorStore, closed_error, with_hint_of_room
from sage.services.vectors.filters import ALWAYS, All, AnyOf, Compare, Contains, Exists, OneOf, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from sage.services._shared.address import Url
    from sage.services.vectors.contract import Metric
    from sage.services.vectors.filters import Condition, Metadata, Scalar
    from sage.services.vectors.rows import Rows, Vectors

    Kinds = str | Mapping[str, Metadata] | None

T = TypeVar("T")

METRICS = {"cosine": "COSINE", "dot": "IP", "l2": "L2"}
NAMES = {name: metric for metric, name in METRICS.items()}

TEXT_BYTES_MAX = 65_535
"""The longest text that a Milvus server takes in one field."""

K_MAX = 16_384
"""How many entries a Milvus server gives in one answer."""

WRITE_MAX, READ_MAX, SEARCH_MAX = 1_000, 8_000, 1_000
"""How many entries are written, read, and searched for in one request, which may take 64 MB."""

THREADS_MAX = 10
MESSAGE_BYTES_MAX = 256 * 1024 * 1024
"""How many requests the server in this process answers at once, and how long one may be: as a Milvus server does."""

LOCK = "LOCK"
"""The file that Milvus Lite holds while it has a folder open, and leaves there."""

STOP_S = 2.0
"""How long requests in hand may take when the server in this process is stopped."""

NOT_ALLOWED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "1400", "1401")
"""The errors of gRPC and Milvus for a wrong token, or a token without the needed permission."""

NO_COLLECTION = 100
"""Milvus's answer if a collection does not exist."""

ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"})
"""Characters that must be escaped in a string of an expression; Milvus Lite does not know the other escapes of JSON."""

KINDS = ("number", "text", "bool", "list")
MEMBERS = "members"
"""Where the values of lists are, as names of fields: versions do not agree on how numbers in lists are compared."""

NAME_MAX = 255
CODED = re.compile(r"_(x[0-9a-f]{2}_)")

OPERATORS = {"$lt": "<", "$lte": "<=", "$gt": ">", "$gte": ">="}
OPPOSITES = {"$lt": ">=", "$lte": ">", "$gt": "<=", "$gte": "<"}


_Row = TypedDict(
    "_Row",
    {"id": str, "vector": "Sequence[float]", "document": str | None, "metadata": "Kinds", "count(*)": int},
    total=False,
)


class _FoundRow(TypedDict):
    id: str
    distance: float
    entity: _Row


class _Pages(Protocol):
    next: Callable[[], list[_Row]]
    close: Callable[[], None]


class _Parts(Protocol):
    add_field: Callable[..., object]
    add_index: Callable[..., object]


class MilvusClient(Protocol):
    """The parts of `pymilvus.MilvusClient` that are used here."""

    list_collections: Callable[..., list[str]]
    has_collection: Callable[..., bool]
    describe_collection: Callable[..., Mapping[str, Sequence[Mapping[str, Any]]]]
    describe_index: Callable[..., Mapping[str, str]]
    load_collection: Callable[..., None]
    create_schema: Callable[..., _Parts]
    prepare_index_params: Callable[..., _Parts]
    create_collection: Callable[..., None]
    create_index: Callable[..., None]
    drop_collection: Callable[..., None]
    flush: Callable[..., object]
    upsert: Callable[..., object]
    delete: Callable[..., object]
    query: Callable[..., list[_Row]]
    query_iterator: Callable[..., _Pages]
    search: Callable[..., list[list[_FoundRow]]]
    close: Callable[[], None]


class MilvusStore(VectorStore):
    """A vector store in Milvus, in this process with `path` (Milvus Lite), or in a server with `uri`.

    A collection has the fields `id`, `vector`, `document` and `metadata`; the metadata is a JSON object that holds the
    objects `number`, `text` and `bool`, so that values of different kinds are never compared. Documents have at most
    65,535 bytes.

    Milvus Lite is for one store at a time. It listens on a port of 127.0.0.1 while it is open. Its libraries keep four
    threads of their own, which Python does not list, and a few descriptors for the life of the process from the first
    use on; with `host="process"` they end with the service. Entries written since the last search are made searchable
    by the next one, so write in batches and search in batches.

    Args:
        path: the folder of Milvus Lite, which is made if it is not there.
        dimension: see `VectorStore`.
        uri: the address of a server, such as "http://127.0.0.1:19530", or that of a command service. A name and a
            password in it are the token, and shown nowhere.
        token: for the server: a key, or "user:password".
        database: the database of the server.
        metric: see `VectorStore`.
        collection: see `VectorStore`.
        index: the kind of index of new collections; by default "FLAT", which is exact, with `path`, and "AUTOINDEX",
            which the server chooses, with `uri`.
        timeout_s: how long one request may take, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        dimension: int | None = None,
        *,
        uri: Url | None = None,
        token: str | None = None,
        database: str = "",
        metric: Metric = "cosine",
        collection: str = "default",
        index: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(dimension, metric=metric, collection=collection)
        if (path is None) is (uri is None):
            raise ValueError("MilvusStore takes either a path or a uri")
        if token is not None and uri is None:
            raise ValueError("MilvusStore takes a token only with a uri")
        self.path = None if path is None else os.path.abspath(os.fspath(path))
        if isinstance(uri, str):
            split_credentials("uri", uri, token)
        self.uri = uri
        self.database = database
        self.index = index or ("FLAT" if uri is None else "AUTOINDEX")
        self.timeout_s = timeout_s
        self._token = token
        self._secrets: tuple[str, ...] = ()
        self._folder: FolderLock | None = None
        self._started = ExitStack()
        self._client: MilvusClient | None = None
        self._found: dict[str, Shape] = {}
        self._unflushed: set[str] = set()
        self._address = ""
        self._shown_uri = redact_url(uri) if isinstance(uri, str) else ""

    def setup(self) -> None:
        """Open the folder, or connect to the server.

        Raises:
            ServiceUnavailableError: nothing answers at the address within `timeout_s`.
            ServiceError: the folder is in use, or the server refuses the token or the database.
            ValueError: the store's own collection has another dimension or metric.
            MissingExtraError: Milvus is not installed.
        """
        load("pymilvus", "milvus")
        with self._opening():
            if self.path is None:
                given = resolved(self.uri or "")
                uri, user = split_credentials("uri", given, self._token)
                self._shown_uri = redact_url(given)
                self._address = f"Milvus at {self._shown_uri}"
                self._connect(uri, user or self._token)
            else:
                self._address = f'Milvus folder "{self.path}"'
                self._folder = FolderLock(self.path, "Milvus folder")
                self._connect(self._start(self.path))
                self._folder.hold(LOCK)
        self._check_own_collection()

    def cleanup(self) -> None:
        """Close the folder or the connection."""
        folder, self._folder = self._folder, None
        try:
            self._end()
        finally:
            if folder is not None:
                folder.discard(LOCK)
                folder.close()

    def health(self) -> bool:
        """Return whether Milvus answers."""
        try:
            self._check_place()
            self._names()
        except ServiceError:
            return False
        return True

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        place = {"path": self.path} if self.path is not None else {"uri": self._shown_uri, "database": self.database}
        return {**super().describe(), **place, "index": self.index}

    def _check_place(self) -> None:
        if self._folder is not None:
            self._folder.check()

    @property
    def _open(self) -> MilvusClient:
        if self._client is None:
            raise closed_error(self)
        return self._client

    def _connect(self, uri: str, token: str | None = None) -> None:
        client = load("pymilvus", "milvus").MilvusClient
        self._secrets = () if token is None else (token, basic_auth(token).removeprefix("Basic "))
        options: dict[str, object] = {} if token is None else {"token": token}
        # The library keeps connections that clients share for the life of the process, and gRPC goes on for 20 s with
        # one that nobody waits for any more.
        attempt = {"grpc.min_reconnect_backoff_ms": max(int(1_000 * self.timeout_s), 1)}
        if is_here(uri):
            attempt["grpc.enable_http_proxy"] = 0  # no proxy can reach this machine for it
        options |= {"db_name": self.database, "dedicated": True, "grpc_options": attempt}
        self._client = opened = client(uri=uri, timeout=self.timeout_s, **options)
        # The connection alone shows neither the token nor the database to be right.
        opened.list_collections(timeout=self.timeout_s)

    def _start(self, path: str) -> str:
        """Start Milvus Lite in this process and return its address.

        It is not left to the client, which hides why a folder cannot be opened and does not wait for the end.
        """
        grpc, servicers = load("grpc", "milvus"), load("milvus_lite.adapter.grpc.servicer", "milvus")
        register = load("pymilvus.grpc_gen.milvus_pb2_grpc", "milvus").add_MilvusServiceServicer_to_server
        try:
            files = load("milvus_lite.db", "milvus").MilvusLite(path)
        except (OSError, load("milvus_lite.exceptions", "milvus").MilvusLiteError) as error:
            refused = ServiceError(f"{self._address} cannot be opened: {error}", fault="external")
            raise with_hint_of_room(refused) from error
        self._started.callback(files.close)
        # gRPC does not end the threads that it is given.
        threads = self._started.enter_context(ThreadPoolExecutor(THREADS_MAX, "milvus-lite"))
        sizes = [(f"grpc.max_{way}_message_length", MESSAGE_BYTES_MAX) for way in ("send", "receive")]
        server = grpc.server(threads, options=sizes)
        self._started.callback(lambda: server.stop(grace=STOP_S).wait())
        register(servicers.MilvusServicer(files), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return f"http://127.0.0.1:{port}"

    def _end(self) -> None:
        client, self._client = self._client, None
        self._found, self._unflushed = {}, set()
        with self._started.pop_all():
            if client is not None:
                client.close()

    def _reopen(self) -> None:
        if self.path is None or self._folder is None:
            return
        with suppress(OSError):  # data that could not be written before cannot be written now either
            self._end()
        try:
            with self._translated_errors():
                self._connect(self._start(self.path))
        except BaseException:
            with suppress(OSError):
                self._end()
            raise

    @contextmanager
    def _opening(self) -> Iterator[None]:
        try:
            with self._translated_errors():
                yield
        except BaseException:
            with suppress(ServiceError):
                self.cleanup()
            raise

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise the library's message with the place that it is about."""
        grpc, library = load("grpc", "milvus"), load("pymilvus.exceptions", "milvus")
        try:
            yield
        except grpc.RpcError as error:
            raise self._refusal(error.code().name, error.details() or "", error) from self._cause(error)
        except library.MilvusException as error:
            cause = error.__cause__
            if isinstance(cause, grpc.RpcError):  # the library says of every reason alone that it cannot connect
                raise self._refusal(cause.code().name, cause.details() or "", error) from self._cause(error)
            if error.code == NO_COLLECTION:  # another program has removed it
                self._found.clear()
            is_away = error.code == 2 or "UNAVAILABLE" in error.message or "DEADLINE_EXCEEDED" in error.message
            code = "UNAVAILABLE" if is_away else str(error.code)
            raise self._refusal(code, error.message, error) from self._cause(error)

    def _ask(self, method: Callable[..., T], name: str, *args: object, **options: object) -> T:
        """Send a request about a collection."""
        with self._translated_errors():
            return method(_milvus_name(name), *args, timeout=self.timeout_s, **options)

    def _cause(self, error: BaseException) -> BaseException | None:
        return redacted_cause(error, *self._secrets)

    def _refusal(self, code: str, text: str, error: BaseException) -> ServiceError:
        text = redact(text or str(error), *self._secrets)
        if code in NOT_ALLOWED or "auth check failure" in text:
            return hint(ServiceError(f"{self._address} refuses the token: {text}"), "Give another token=.")
        if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            return ServiceUnavailableError(f"{self._address} does not answer: {text}", fault="external")
        return with_hint_of_room(ServiceError(f"{self._address} has failed: {text}", fault="external"))

    # --- collections ---

    def _shape(self, name: str) -> Shape | None:
        client = self._open
        found = self._found.get(name)
        if found is None:
            if not self._ask(client.has_collection, name):
                return None
            fields = {field["name"]: field for field in self._ask(client.describe_collection, name)["fields"]}
            if not {"id", "vector", "document", "metadata"} <= fields.keys():
                raise ServiceError(f'collection "{name}" in {self._address} was made by another program')
            index = self._ask(client.describe_index, name, "vector")
            # A collection that was made before has to be loaded by whoever opens it.
            self._ask(client.load_collection, name)
            shape = Shape(int(fields["vector"]["params"]["dim"]), NAMES[index["metric_type"]])
            found = self._found[name] = shape
            # The writes of a killed program are in a log, and searching that is slow.
            self._unflushed.add(name)
        return found

    def _create(self, name: str, shape: Shape) -> None:
        kinds = load("pymilvus", "milvus").DataType
        client = self._open
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", kinds.VARCHAR, max_length=TEXT_BYTES_MAX, is_primary=True)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=shape.dimension)
        schema.add_field("document", kinds.VARCHAR, max_length=TEXT_BYTES_MAX, nullable=True)
        schema.add_field("metadata", kinds.JSON)
        parameters = client.prepare_index_params()
        parameters.add_index("vector", index_type=self.index, metric_type=METRICS[shape.metric])
        # "Strong": a read sees everything that was written before it.
        self._ask(client.create_collection, name, schema=schema, consistency_level="Strong")
        self._ask(client.create_index, name, parameters, sync=False)
        self._ask(client.load_collection, name)

    def _names(self) -> Collection[str]:
        with self._translated_errors():
            return [_own_name(name) for name in self._open.list_collections(timeout=self.timeout_s)]

    def _discard(self, name: str) -> None:
        self._ask(self._open.drop_collection, name)
        self._found.pop(name, None)
        self._unflushed.discard(name)

    def _ready(self, name: str) -> None:
        """Bring written entries into a form that can be searched fast; a server does so by itself."""
        if self.path is not None and name in self._unflushed:
            with self._changing():
                if name in self._unflushed:
                    self._ask(self._open.flush, name)
                    self._unflushed.discard(name)

    # --- entries ---

    def _write(self, name: str, rows: Rows) -> None:
        for one, document in zip(rows.ids, rows.documents, strict=True):
            if document is not None and len(document) * 4 > TEXT_BYTES_MAX:
                size = len(document.encode())
                if size > TEXT_BYTES_MAX:
                    text = f"the document of id {short(one)} has {size} bytes, and Milvus takes {TEXT_BYTES_MAX}"
                    raise ValueError(text)
        for start in range(0, len(rows.ids), WRITE_MAX):
            part = rows.cut(start, start + WRITE_MAX)
            columns = zip(part.ids, part.vectors, part.documents, map(_by_kind, part.metadatas), strict=True)
            self._unflushed.add(name)
            entries = [dict(zip(("id", "vector", "document", "metadata"), column, strict=True)) for column in columns]
            self._ask(self._open.upsert, name, entries)

    def _remove(self, name: str, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), READ_MAX):
            self._unflushed.add(name)
            self._ask(self._open.delete, name, filter=_among(ids[start : start + READ_MAX]))

    def _read(self, name: str, ids: Sequence[str], fields: list[str]) -> Iterator[_Row]:
        for start in range(0, len(ids), READ_MAX):
            text = _among(ids[start : start + READ_MAX])
            yield from self._ask(self._open.query, name, filter=text, output_fields=fields)

    def _known(self, name: str, ids: Sequence[str]) -> list[str]:
        unique = list(dict.fromkeys(ids))
        found = {row["id"] for row in self._read(name, unique, ["id"])}
        return [one for one in unique if one in found]

    def _matching(self, name: str, condition: Condition) -> list[str]:
        text = "" if condition == ALWAYS else translated(condition)
        settings: dict[str, object] = {"filter": text, "output_fields": ["id"]}
        self._ready(name)
        if self.path is not None:
            return [row["id"] for row in self._ask(self._open.query, name, **settings)]
        # A server limits the size of one answer.
        iterator = self._ask(self._open.query_iterator, name, batch_size=READ_MAX, **settings)
        with self._translated_errors():
            try:
                found: list[str] = []
                while rows := iterator.next():
                    found += [row["id"] for row in rows]
                return found
            finally:
                iterator.close()

    def _nearest(self, name: str, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        if k > K_MAX:
            raise ValueError(f"k is {k}, and Milvus gives {K_MAX} at most")
        metric = self._found[name].metric
        found: list[list[Hit]] = []
        self._ready(name)
        for start in range(0, len(vectors), SEARCH_MAX):
            answer = self._ask(
                self._open.search,
                name,
                data=list(vectors[start : start + SEARCH_MAX]),
                limit=k,
                filter="" if condition == ALWAYS else translated(condition),
                output_fields=["document", "metadata"],
                search_params={"metric_type": METRICS[metric]},
            )
            found += [[_hit(metric, hit) for hit in hits] for hits in answer]
        return found

    def _fetch(self, name: str, ids: Sequence[str]) -> dict[str, Entry]:
        np = load("numpy", "vector")
        rows = self._read(name, list(dict.fromkeys(ids)), ["id", "vector", "document", "metadata"])
        return {
            row["id"]: Entry(
                row["id"], np.asarray(row["vector"], dtype=np.float32), row["document"], _flat(row["metadata"])
            )
            for row in rows
        }

    def _count(self, name: str, condition: Condition) -> int:
        self._ready(name)
        text = "" if condition == ALWAYS else translated(condition)
        return int(self._ask(self._open.query, name, filter=text, output_fields=["count(*)"])[0]["count(*)"])

    def _flush(self) -> None:
        for name in sorted(self._unflushed):
            self._ask(self._open.flush, name)
            self._unflushed.discard(name)


def translated(condition: Condition) -> str:
    """Return a condition other than `ALWAYS` and `NEVER` in the language of Milvus.

    A path that may be missing is tested only by "exists", as versions do not agree on the meaning of `!=` there.
    """
    match condition:
        case All(parts):
            return " and ".join(f"({translated(part)})" for part in parts)
        case AnyOf(parts):
            return " or ".join(f"({translated(part)})" for part in parts)
        case OneOf(field, values, is_negated):
            if not is_negated:
                return " or ".join(f"({_path(field, value)} == {_literal(value)})" for value in values)
            return " and ".join(
                f"(not (exists {_path(field, value)}) or {_path(field, value)} != {_literal(value)})"
                for value in values
            )
        case Compare(field, name, value, is_negated):
            path = _path(field, value)
            if not is_negated:
                return f"{path} {OPERATORS[name]} {_literal(value)}"
            return f"not (exists {path}) or {path} {OPPOSITES[name]} {_literal(value)}"
        case Contains(field, value, is_negated):
            test = f'exists metadata["{MEMBERS}"][{_literal(field)}][{_literal(_member(value))}]'
            return f"not ({test})" if is_negated else test
        case Exists(field, is_negated):
            test = " or ".join(f'exists metadata["{kind}"][{_literal(field)}]' for kind in KINDS)
            return f"not ({test})" if is_negated else test


def _path(field: str, value: Scalar) -> str:
    return f'metadata["{kind_of(value)}"][{_literal(field)}]'


def _literal(value: Scalar) -> str:
    return f'"{value.translate(ESCAPES)}"' if isinstance(value, str) else json.dumps(value)


def _among(ids: Sequence[str]) -> str:
    """Return the expression that holds for some ids; the library, given the ids, would not escape them."""
    return f"id in [{', '.join(map(_literal, ids))}]"


def _by_kind(metadata: Metadata) -> dict[str, dict[str, object]]:
    kinds: dict[str, dict[str, object]] = {}
    for field, value in metadata.items():
        kinds.setdefault(kind_of(value), {})[field] = value
        if isinstance(value, list):
            kinds.setdefault(MEMBERS, {})[field] = dict.fromkeys(map(_member, value), True)
    return kinds


def _member(value: Scalar) -> str:
    """Return a value of a list as the name of a field, the same for equal values."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return f"{kind_of(value)}:{value}"


def _milvus_name(name: str) -> str:
    """Return the name of a collection in letters, digits and underscores, which is all that Milvus takes."""
    first, rest = name[:1], CODED.sub(lambda match: _coded("_") + match[1], name[1:])
    kept = _coded(first) if first.isdigit() else first
    kept += re.sub(r"[^A-Za-z0-9_]", lambda match: _coded(match[0]), rest)
    if len(kept) > NAME_MAX:
        raise ValueError(f"the name of collection {short(name)} is too long for Milvus, which takes {NAME_MAX} letters")
    return kept


def _coded(letter: str) -> str:
    return f"_x{ord(letter):02x}_"


def _own_name(kept: str) -> str:
    """Return the name that a collection was given."""
    return re.sub(r"_x([0-9a-f]{2})_", lambda match: chr(int(match[1], 16)), kept)


def _flat(kinds: Kinds) -> Metadata:
    found: Mapping[str, Metadata] = (json.loads(kinds) if isinstance(kinds, str) else kinds) or {}
    return {field: value for kind, values in found.items() if kind != MEMBERS for field, value in values.items()}


def _hit(metric: str, hit: _FoundRow) -> Hit:
    entity = hit["entity"]
    distance = hit["distance"]
    # Milvus gives the square of the distance, and otherwise its "distance" is higher for nearer ones.
    score = -(max(distance, 0.0) ** 0.5) if metric == "l2" else distance
    return Hit(hit["id"], score, entity["document"], _flat(entity["metadata"]))
