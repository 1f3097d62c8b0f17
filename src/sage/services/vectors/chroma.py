"""Vectors in Chroma: embedded in this process, or in a server."""

from __future__ import annotations

import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypedDict
from urllib.parse import quote

from sage._extras import load
from sage.command import Http
from sage.errors import ServiceError, ServiceUnavailableError, describe, hint
from sage.services._shared.address import (
    basic_auth,
    checked_url,
    redact_url,
    resolved,
    split_credentials,
    without_proxy,
)
from sage.services._shared.locks import FolderLock
from sage.services._shared.secret import SENDABLE, causes_of, redact, redacted_cause
from sage.services.vectors.contract import Entry, Hit, Shape, VectorStore, closed_error, with_hint_of_room
from sage.services.vectors.filters import ALWAYS, All, AnyOf, Compare, Contains, Exists, OneOf, kind_of, predicate

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from sage.services._shared.address import Url
    from sage.services.vectors.contract import Metric
    from sage.services.vectors.filters import Condition, Metadata, Scalar
    from sage.services.vectors.rows import Rows, Vectors

SPACES = {"cosine": "cosine", "dot": "ip", "l2": "l2"}
METRICS = {space: metric for metric, space in SPACES.items()}
DIMENSION = "sage_dimension"
"""Where a collection of ours keeps its dimension, among its own metadata."""

VANISHED = ("Error finding id", "Error getting embedding")
"""Chroma's messages if an entry was removed while it searched, before or after it was found."""

FILE = "chroma.sqlite3"
"""The file in a folder of Chroma that all of its data is found by."""

HEARTBEAT = "/api/v2/heartbeat"
EXACT_MAX = 2**53
"""Up to here every integer is a float too, so that it does not matter as which of the two a number is compared."""

READ_MAX = 10_000
"""How many entries are read at once where all of a collection are gone through."""

ESCAPE = "sage:"
RESERVED = re.compile(rf"(?:{ESCAPE})*(?:#|chroma:)")
"""How fields begin that Chroma keeps for itself, and which are stored with one `ESCAPE` more before them."""


class _Columns(TypedDict):
    ids: list[str]
    embeddings: Sequence[Sequence[float]]
    documents: Sequence[str | None]
    metadatas: Sequence[Metadata | None]


class ChromaCollection(Protocol):
    """The parts of `chromadb.Collection` that are used here."""

    name: str
    configuration_json: Mapping[str, Mapping[str, str]]
    metadata: Mapping[str, int] | None
    get: Callable[..., _Columns]
    query: Callable[..., Mapping[str, list[list[Any]]]]
    add: Callable[..., None]
    delete: Callable[..., object]
    count: Callable[[], int]


class ChromaClient(Protocol):
    """The parts of a client of Chroma that are used here."""

    heartbeat: Callable[[], int]
    get_max_batch_size: Callable[[], int]
    get_collection: Callable[..., ChromaCollection]
    create_collection: Callable[..., ChromaCollection]
    list_collections: Callable[[], Sequence[ChromaCollection]]
    delete_collection: Callable[[str], None]
    close: Callable[[], None]


class _Session(Protocol):
    timeout: float
    close: Callable[[], None]


class CommandArguments(TypedDict):
    """Arguments of `Environment.register_command`."""

    argv: list[str | os.PathLike[str]]
    ready: Http
    health: Http


def chroma_command(path: str | os.PathLike[str] | None = None, *, program: str | None = None) -> CommandArguments:
    """Return the arguments with which `env.register_command(name, **chroma_command())` runs a Chroma server.

    It listens on a free port of 127.0.0.1, or on a cluster, of its node's address; the handle's `url` is for
    `ChromaStore(url=...)`.

    Args:
        path: the folder that it keeps its data in; by default a private one that is gone after the job.
        program: the program `chroma`; by default the one beside this Python, or else the one that is found first.
    """
    beside = os.path.join(os.path.dirname(sys.executable), "chroma")
    found = program or (beside if os.path.exists(beside) else "chroma")
    folder: str | os.PathLike[str] = (
        "{folder}" if path is None else os.path.abspath(path).replace("{", "{{").replace("}", "}}")
    )
    return {
        "argv": [found, "run", "--host", "{host}", "--port", "{port}", "--path", folder],
        "ready": Http(HEARTBEAT),
        "health": Http(HEARTBEAT),
    }


class ChromaStore(VectorStore):
    """A vector store in Chroma, embedded with `path`, or in a server with `url`.

    Chroma searches with an index that may miss an entry now and then; it finds nearly all. A comparison by order of
    texts, a `$not` around a comparison by order, `$exists`, `$not_contains`, and `$contains` of a number are done here
    and read the metadata of the whole collection.
    An entry that takes the place of another one is removed and stored again, as Chroma would mix the two.
    Metadata is stored under the names of its fields, but that a name which begins as Chroma's own do, with "#" or
    "chroma:", has "sage:" before it there.

    Embedded, a folder is for one store at a time. The library keeps two threads of its own, which Python does not list,
    and a pair of sockets for the life of the process from the first use on, and a process must not be forked while a
    store is open: with `host="process"`, all of that ends with the service.

    Args:
        path: the folder of an embedded Chroma, which is made if it is not there.
        dimension: see `VectorStore`.
        url: the address of a server, or that of a command service: `env.register_command(...).url`. A name and a
            password in it are sent as `Authorization: Basic`, and shown nowhere.
        token: sent as `Authorization: Bearer` to the server, or to a proxy before it.
        tenant: the tenant on the server.
        database: the database of the tenant.
        metric: see `VectorStore`.
        collection: see `VectorStore`.
        timeout_s: how long one request to a server may take, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        dimension: int | None = None,
        *,
        url: Url | None = None,
        token: str | None = None,
        tenant: str = "default_tenant",
        database: str = "default_database",
        metric: Metric = "cosine",
        collection: str = "default",
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(dimension, metric=metric, collection=collection)
        if (path is None) is (url is None):
            raise ValueError("ChromaStore takes either a path or a url")
        if token is not None and url is None:
            raise ValueError("ChromaStore takes a token only with a url")
        self.path = None if path is None else os.path.abspath(os.fspath(path))
        if isinstance(url, str):
            split_credentials("url", checked_url("url", url), token)
        if token is not None and not SENDABLE.fullmatch(token):
            error = ValueError("the token cannot be sent in a header")
            raise hint(error, "It must be one line of printable ASCII characters, without spaces around it.")
        self.url = url
        self.tenant, self.database = tenant, database
        self.timeout_s = timeout_s
        self._token = token
        self._secrets: tuple[str, ...] = (token or "",)
        self._folder: FolderLock | None = None
        self._client: ChromaClient | None = None
        self._sessions: list[_Session] = []
        self._found: dict[str, tuple[ChromaCollection, Shape]] = {}
        self._address = ""
        self._shown_url = redact_url(url) if isinstance(url, str) else ""

    def setup(self) -> None:
        """Open the folder, or connect to the server.

        Raises:
            ServiceUnavailableError: nothing answers at the address within `timeout_s`.
            ServiceError: the folder is in use, or the server refuses the token, the tenant or the database.
            ValueError: the store's own collection has another dimension or metric.
            MissingExtraError: Chroma is not installed.
        """
        chromadb = load("chromadb", "chroma")
        if self.path is not None:
            self._address = f'Chroma folder "{self.path}"'
            self._folder = FolderLock(self.path, "Chroma folder")
            with self._translated_errors():
                self._start(self.path)
            self._folder.hold(FILE)
        else:
            given = checked_url("url", resolved(self.url or "")).rstrip("/")
            url, user = split_credentials("url", given, self._token)
            self._shown_url = redact_url(given)
            self._address = f"Chroma at {self._shown_url}"
            headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
            if user:
                headers = {"Authorization": basic_auth(user)}
                self._secrets = (user.partition(":")[2], basic_auth(user).removeprefix("Basic "))
            with without_proxy(url):
                self._ask_first(url, headers)
            with self._translated_errors(), without_proxy(url):
                client = chromadb.HttpClient(
                    host=url,
                    ssl=url.startswith("https:"),
                    headers=dict(headers),
                    settings=chromadb.Settings(anonymized_telemetry=False),
                    tenant=self.tenant,
                    database=self.database,
                )
            # The library offers no setting for the time-out, and does not close the connections.
            # It makes a second one that only its constructor uses.
            self._client = client
            self._sessions = [part._server._session for part in (client, client._admin_client)]
            for session in self._sessions:
                session.timeout = self.timeout_s
        self._check_own_collection()

    def cleanup(self) -> None:
        """Close the folder or the connections."""
        client, self._client = self._client, None
        sessions, self._sessions = self._sessions, []
        folder, self._folder = self._folder, None
        self._found = {}
        try:
            if client is not None:
                client.close()
            for session in sessions:
                session.close()
        finally:
            if folder is not None:
                folder.close()

    def health(self) -> bool:
        """Return whether Chroma answers."""
        try:
            self._check_place()
            with self._translated_errors():
                self._open.heartbeat()
        except ServiceError:
            return False
        return True

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        place = {"path": self.path} if self.path is not None else {"url": self._shown_url, "database": self.database}
        return {**super().describe(), **place}

    def _check_place(self) -> None:
        if self._folder is not None:
            self._folder.check()

    @property
    def _open(self) -> ChromaClient:
        if self._client is None:
            raise closed_error(self)
        return self._client

    def _start(self, path: str) -> None:
        chromadb = load("chromadb", "chroma")
        self._client = chromadb.PersistentClient(path=path, settings=chromadb.Settings(anonymized_telemetry=False))

    def _reopen(self) -> None:
        if self.path is None or self._folder is None:
            return
        client, self._client = self._client, None
        self._found = {}
        if client is not None:
            client.close()
        folder, self._folder = self._folder, None
        try:
            with self._translated_errors():
                self._start(self.path)
        finally:
            self._folder = folder

    def _ask_first(self, url: str, headers: Mapping[str, str]) -> None:
        """Find out within the time-out whether the server answers and lets us in; the library leaks if it does not."""
        names = (quote(name, safe="") for name in (self.tenant, self.database))
        address = "{}/api/v2/tenants/{}/databases/{}".format(url, *names)
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=dict(headers)), timeout=self.timeout_s):
                return
        except urllib.error.HTTPError as error:
            with error:
                text = f"{error.code} {error.reason}"
                if error.code == http.HTTPStatus.NOT_FOUND:
                    text = f'it has no database "{self.database}" of tenant "{self.tenant}"'
                raise self._refusal(error.code, text) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServiceUnavailableError(f"{self._address} does not answer: {reason}", fault="external") from error

    def _refusal(self, code: int | None, text: str) -> ServiceError:
        text = redact(text, *self._secrets)
        if code in (401, 403):
            return hint(ServiceError(f"{self._address} refuses the token: {text}"), "Give another token=.")
        return with_hint_of_room(ServiceError(f"{self._address} has failed: {text}", fault="external"))

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise the library's message with the place that it is about; close everything if it was not open yet."""
        was_open = self._client is not None
        library = sys.modules["chromadb.errors"].ChromaError
        transport = sys.modules["httpx"]
        try:
            yield
        except Exception as error:
            if not was_open:
                self.cleanup()
            if isinstance(error, transport.TransportError):
                text = f"{self._address} does not answer: {describe(error)}"
                raise ServiceUnavailableError(text, fault="external") from error
            # An answer that is not from Chroma itself, such as that of a proxy, is raised as a plain exception.
            is_told = isinstance(error, library) or type(error) in (Exception, RuntimeError, transport.HTTPStatusError)
            if is_told or (isinstance(error, ValueError) and not was_open):
                cause = redacted_cause(error, *self._secrets)
                raise self._refusal(_status_of(error), str(error)) from cause
            raise

    # --- collections ---

    def _shape(self, name: str) -> Shape | None:
        try:
            return self._collection(name)[1]
        except KeyError:
            return None

    def _collection(self, name: str) -> tuple[ChromaCollection, Shape]:
        """Return a collection; KeyError if it does not exist."""
        client = self._open
        found = self._found.get(name)
        if found is None:
            with self._translated_errors():
                try:
                    collection = client.get_collection(name, embedding_function=None)
                except sys.modules["chromadb.errors"].NotFoundError:
                    raise KeyError(name) from None
                found = self._found[name] = (collection, self._shape_of(collection))
        return found

    def _shape_of(self, collection: ChromaCollection) -> Shape:
        configuration = collection.configuration_json
        space = (configuration.get("hnsw") or configuration.get("spann") or {}).get("space", "l2")
        dimension = (collection.metadata or {}).get(DIMENSION)
        if dimension is None:  # another program has made it
            vectors = collection.get(limit=1, include=["embeddings"])["embeddings"]
            dimension = len(vectors[0]) if len(vectors) else self.dimension or 1
        return Shape(int(dimension), METRICS[space])

    @contextmanager
    def _using(self, name: str) -> Iterator[ChromaCollection]:
        """Give a collection, and look it up again the next time if another program has removed it."""
        try:
            collection = self._collection(name)[0]
            with self._translated_errors():
                yield collection
        except (KeyError, ServiceError) as error:
            gone = isinstance(error.__cause__, sys.modules["chromadb.errors"].NotFoundError)
            if gone or isinstance(error, KeyError):
                self._found.pop(name, None)
                text = f'collection "{name}" was removed from {self._address} meanwhile'
                raise ServiceError(text, fault="external") from error
            raise

    def _create(self, name: str, shape: Shape) -> None:
        with self._translated_errors():
            self._open.create_collection(
                name,
                embedding_function=None,
                configuration={"hnsw": {"space": SPACES[shape.metric]}},
                metadata={DIMENSION: shape.dimension},
                get_or_create=True,
            )

    def _names(self) -> Collection[str]:
        with self._translated_errors():
            return [collection.name for collection in self._open.list_collections()]

    def _discard(self, name: str) -> None:
        with self._translated_errors():
            self._open.delete_collection(name)
        self._found.pop(name, None)

    # --- entries ---

    def _write(self, name: str, rows: Rows) -> None:
        step = self._open.get_max_batch_size()
        with self._using(name) as collection:
            for start in range(0, len(rows.ids), step):
                part = rows.cut(start, start + step)
                known = collection.get(ids=list(part.ids), include=[])["ids"]
                if known:
                    # To Chroma, an upsert keeps the fields that the new metadata has not, and moves the vector within
                    # its index, which takes a hundred times as long as a new one.
                    collection.delete(ids=known)
                collection.add(
                    ids=list(part.ids),
                    embeddings=part.vectors,
                    documents=list(part.documents) if any(text is not None for text in part.documents) else None,
                    metadatas=list(map(_kept, part.metadatas)) if any(part.metadatas) else None,
                )

    def _remove(self, name: str, ids: Sequence[str]) -> None:
        step = self._open.get_max_batch_size()
        with self._using(name) as collection:
            for start in range(0, len(ids), step):
                collection.delete(ids=list(ids[start : start + step]))

    def _known(self, name: str, ids: Sequence[str]) -> list[str]:
        found: set[str] = set()
        unique = list(dict.fromkeys(ids))
        with self._using(name) as collection:
            for start in range(0, len(unique), READ_MAX):
                found.update(collection.get(ids=unique[start : start + READ_MAX], include=[])["ids"])
        return [one for one in unique if one in found]

    def _matching(self, name: str, condition: Condition) -> list[str]:
        where, is_exact = translated(condition)
        holds = predicate(condition)
        found: list[str] = []
        with self._using(name) as collection:
            start, is_more = 0, True
            while is_more:
                include = [] if is_exact else ["metadatas"]
                part = collection.get(where=where, include=include, limit=READ_MAX, offset=start)
                ids = part["ids"]
                found += (
                    ids
                    if is_exact
                    else [one for one, metadata in zip(ids, part["metadatas"], strict=True) if holds(_given(metadata))]
                )
                start, is_more = start + len(ids), len(ids) == READ_MAX
        return found

    def _nearest(self, name: str, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        try:
            return self._queried(name, vectors, k, condition)
        except ServiceError as error:
            if not any(message in str(error) for message in VANISHED):
                raise
        # Nothing is removed while this thread has the place of the writers, unless by another program.
        with self._writing:
            return self._queried(name, vectors, k, condition)

    def _queried(self, name: str, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        where, is_exact = translated(condition)
        ids = None if is_exact else self._matching(name, condition)
        if ids == []:
            return [[] for _ in vectors]
        with self._using(name) as collection:
            found = collection.query(
                query_embeddings=vectors,
                n_results=k,
                ids=ids,
                where=where,
                include=["metadatas", "documents", "distances"],
            )
        metric = self._collection(name)[1].metric
        columns = zip(found["ids"], found["distances"], found["documents"], found["metadatas"], strict=True)
        return [
            [
                Hit(one, _score(metric, distance), document, _given(metadata))
                for one, distance, document, metadata in zip(*column, strict=True)
            ]
            for column in columns
        ]

    def _fetch(self, name: str, ids: Sequence[str]) -> dict[str, Entry]:
        np = load("numpy", "vector")
        unique = list(dict.fromkeys(ids))
        entries: dict[str, Entry] = {}
        with self._using(name) as collection:
            for start in range(0, len(unique), READ_MAX):
                part = collection.get(
                    ids=unique[start : start + READ_MAX], include=["embeddings", "documents", "metadatas"]
                )
                columns = zip(part["ids"], part["embeddings"], part["documents"], part["metadatas"], strict=True)
                for one, vector, document, metadata in columns:
                    entries[one] = Entry(one, np.asarray(vector, dtype=np.float32), document, _given(metadata))
        return entries

    def _count(self, name: str, condition: Condition) -> int:
        if condition != ALWAYS:
            return len(self._matching(name, condition))
        with self._using(name) as collection:
            return collection.count()


def _status_of(error: BaseException) -> int | None:
    """Return the status of the answer that an error comes from, if it comes from one."""
    answers = (getattr(link, "response", None) for link in causes_of(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


def translated(condition: Condition) -> tuple[dict[str, object] | None, bool]:
    """Return a condition in Chroma's language, or None for no filter, and whether it means the same.

    Where it does not, it holds for more than the condition.
    """
    match condition:
        case All(parts):
            found = [translated(part) for part in parts]
            wheres = [where for where, _ in found if where is not None]
            return _joined("$and", wheres), all(is_exact for _, is_exact in found)
        case AnyOf(parts):
            found = [translated(part) for part in parts]
            if any(where is None for where, _ in found):
                return None, False
            return _joined("$or", [where for where, _ in found if where]), all(is_exact for _, is_exact in found)
        case OneOf(field, values, is_negated):
            # A list is of one type.
            by_type: dict[type, list[Scalar]] = defaultdict(list)
            for value in values:
                if not (is_negated and _is_rounded(value)):
                    by_type[type(value)].append(value)
            name, join = ("$nin", "$and") if is_negated else ("$in", "$or")
            wheres = [{_kept_name(field): {name: same}} for same in by_type.values()]
            return _joined(join, wheres), not any(map(_is_rounded, values))
        case Compare(field, name, value, is_negated):
            if is_negated or isinstance(value, str) or abs(value) > EXACT_MAX:
                return None, False
            # Chroma cuts off the decimals when it compares with an integer.
            is_exact = not _is_rounded(value) or name in (("$gt", "$lte") if value > 0 else ("$gte", "$lt"))
            return {_kept_name(field): {name if is_exact else name[:3] + "e": value}}, is_exact
        case Contains(field, value, is_negated):
            if is_negated or kind_of(value) == "number":  # which Chroma tells apart by their types
                return None, False
            return {_kept_name(field): {"$contains": value}}, True
        case Exists():
            return None, False


def _kept_name(field: str) -> str:
    return ESCAPE + field if RESERVED.match(field) else field


def _kept(metadata: Metadata) -> Metadata | None:
    """Return metadata as Chroma takes it, which is None if it is empty."""
    if any(map(RESERVED.match, metadata)) or any(isinstance(value, list) for value in metadata.values()):
        return {_kept_name(field): _kept_value(value) for field, value in metadata.items()}
    return metadata or None


def _kept_value(value: Scalar | list[Scalar]) -> Scalar | list[Scalar]:
    """Return a value as Chroma takes it: the numbers of a list are of one type."""
    if isinstance(value, list) and len({type(each) for each in value}) > 1:
        return [float(each) for each in value]
    return value


def _given(metadata: Metadata | None) -> Metadata:
    """Return metadata as it was before it was kept."""
    if not metadata:
        return {}
    if any(map(RESERVED.match, metadata)):
        return {
            field.removeprefix(ESCAPE) if RESERVED.match(field) else field: value for field, value in metadata.items()
        }
    return metadata


def _is_rounded(value: Scalar) -> bool:
    """Return whether Chroma, which compares a float with integers as an integer and the other way, changes a number."""
    return not isinstance(value, str | bool) and (abs(value) > EXACT_MAX or value != int(value))


def _joined(name: str, wheres: list[dict[str, object]]) -> dict[str, object] | None:
    if len(wheres) > 1:
        return {name: wheres}
    return wheres[0] if wheres else None


def _score(metric: str, distance: float) -> float:
    return -(float(distance) ** 0.5) if metric == "l2" else 1 - distance
