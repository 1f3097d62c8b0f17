"""Where files are: in folders of this machine, or in an object store."""

from __future__ import annotations

import glob
import io
import os
import re
import tempfile
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from sage._extras import load
from sage.errors import GraphError, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obstore import ObjectMeta
    from obstore.store import ObjectStore

URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)/*(.*)", re.DOTALL)
SCHEMES = ("s3", "gs", "az")

READ_BYTES = 4 << 20
RETRIES_MAX = 5
RETRY_S = 20.0
TIMEOUT_S = 30.0
"""How long one request may take, so that a store that hangs holds up a stop for no longer."""

ERROR_CHARS_MAX = 400
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist")
"""An object that is missing may have been taken on from there, but a whole bucket is not."""


class Place(ABC):
    """The files below a path: those that a pattern finds are read by their whole names, those of a folder written.

    Args:
        path: a pattern, or a folder.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    @abstractmethod
    def note(self) -> str:
        """What may be wrong if nothing is found."""

    def open(self) -> None:  # noqa: B027
        """Acquire resources; files can be read and written from now on."""

    def close(self) -> None:  # noqa: B027
        """Release everything."""

    @abstractmethod
    def find(self, suffix: str) -> dict[str, int]:
        """Return the files that the pattern matches, or all below it that end so if it is a folder, in order.

        Each has its number of bytes; a store tells them with the names, and would be asked for each otherwise.
        """

    @abstractmethod
    def read(self, path: str) -> BinaryIO:
        """Return a file to read."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the folder if it is not there, and see whether it can be written into."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the files in the folder, and in folders below it for values of columns."""

    @abstractmethod
    def begin(self, name: str) -> BinaryIO:
        """Return a file to write; `finish` ends it."""

    @abstractmethod
    def finish(self, file: BinaryIO, name: str) -> None:
        """Make a file durable, under its name in the folder."""

    @abstractmethod
    def discard(self, file: BinaryIO, name: str) -> None:
        """Drop a file that was begun, and is not to be finished."""

    @abstractmethod
    def rename(self, name: str, new: str) -> None:
        """Give a file of the folder another name, in a folder that may not be there yet.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file from the folder, if it is there."""

    @abstractmethod
    def sync(self, names: Sequence[str]) -> None:
        """Make new names durable."""


def place_of(path: str) -> Place:
    """Return the place of a path of this machine, or of an address such as "s3://bucket/folder".

    Raises:
        GraphError: the address is of another kind.
        MissingExtraError: the library for object stores is missing.
    """
    return Bucket(path) if URL.match(path) else Disk(path)


class Disk(Place):
    """Files of this machine."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._folder = Path(path)

    @property
    def note(self) -> str:
        """What may be wrong if nothing is found."""
        return f"The program runs in {os.getcwd()}."

    def find(self, suffix: str) -> dict[str, int]:
        """Return the files, and their sizes."""
        pattern = self._path
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "**", f"*{suffix}")
        paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        return {path: os.path.getsize(path) for path in paths}

    def read(self, path: str) -> BinaryIO:
        """Return a file to read."""
        return open(path, "rb", 1 << 20)  # the caller closes it

    def prepare(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder):
            pass

    def names(self) -> list[str]:
        """Return the names of the files."""
        found = []
        for folder, below, names in os.walk(self._folder):
            below[:] = [name for name in below if "=" in name]
            found += [os.path.relpath(os.path.join(folder, name), self._folder) for name in names]
        return found

    def begin(self, name: str) -> BinaryIO:
        """Return a file to write."""
        return (self._folder / name).open("wb")

    def finish(self, file: BinaryIO, name: str) -> None:  # noqa: ARG002  (it has its name)
        """Write a file through to the disk."""
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def discard(self, file: BinaryIO, name: str) -> None:
        """Remove a file."""
        with suppress(OSError):  # of a full disk, which the write has told of
            file.close()
        self.remove(name)

    def rename(self, name: str, new: str) -> None:
        """Give a file another name."""
        path = self._folder / new
        path.parent.mkdir(parents=True, exist_ok=True)
        (self._folder / name).replace(path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self._folder / name).unlink(missing_ok=True)

    def sync(self, names: Sequence[str]) -> None:
        """Write the names of folders through to the disk: those of the files, and those of the folders above them."""
        folders = {self._folder / above for name in names for above in Path(name).parents}
        for path in sorted(folders, reverse=True):
            folder = os.open(path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


class Bucket(Place):
    """Objects of S3, Google Cloud Storage or Azure Blob Storage, by `obstore`.

    Its settings and keys come from the environment, as for the tools of these stores: `AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL` and so on. What is written is in a file without a name on this machine until it is finished.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        parts = URL.match(path)
        assert parts is not None
        scheme, bucket, self._below = parts.groups()
        if scheme not in SCHEMES or not bucket:
            known = ", ".join(f'"{known}://bucket/..."' for known in SCHEMES)
            raise hint(GraphError(f"{short(path)} is the address of no object store"), f"Give one of {known}.")
        load("obstore", "objects")
        self._root = f"{scheme}://{bucket}"
        self._opened: ObjectStore | None = None

    @property
    def _store(self) -> ObjectStore:
        assert self._opened is not None
        return self._opened

    @property
    def note(self) -> str:
        """What may be wrong if nothing is found."""
        return "Names in a bucket have no slash at their beginning, and hidden ones are left out."

    def open(self) -> None:
        """Make a client."""
        with _failures():
            self._opened = load("obstore.store", "objects").from_url(
                self._root,
                # Addresses begin with https, unless the user's own says http.
                client_options={"timeout": timedelta(seconds=TIMEOUT_S), "allow_http": True},
                retry_config={"max_retries": RETRIES_MAX, "retry_timeout": timedelta(seconds=RETRY_S)},
            )

    def close(self) -> None:
        """Let go of the client, which closes its connections."""
        self._opened = None

    def _full(self, name: str) -> str:
        return f"{self._below.rstrip('/')}/{name}".lstrip("/")

    def find(self, suffix: str) -> dict[str, int]:
        """Return the objects, and their sizes."""
        parts = [part for part in self._below.split("/") if part]
        if not glob.has_magic(self._below):
            with _failures(), suppress(FileNotFoundError):
                found = [self._store.head("/".join(parts))] if parts else []
                return {f"{self._root}/{entry['path']}": entry["size"] for entry in found} or self._find([], suffix)
            return self._find(parts, suffix)
        return self._find(parts, None)

    def _find(self, parts: list[str], suffix: str | None) -> dict[str, int]:
        if suffix is not None:
            parts = [*map(glob.escape, parts), "**", f"*{suffix}"]
        fixed = next(place for place, part in enumerate([*parts, "*"]) if glob.has_magic(part))
        found = (entry for entry in self._list(parts[:fixed]) if _matches(entry["path"].split("/"), parts))
        return dict(sorted((f"{self._root}/{entry['path']}", entry["size"]) for entry in found))

    def _list(self, parts: Sequence[str]) -> Iterator[ObjectMeta]:
        with _failures():
            for found in self._store.list("/".join(parts) or None):
                yield from found

    def read(self, path: str) -> BinaryIO:
        """Return an object to read, in pieces."""
        key = path.removeprefix(f"{self._root}/")
        with _failures():
            size = self._store.head(key)["size"]
        return cast("BinaryIO", io.BufferedReader(_Object(self._store, key, size), READ_BYTES))

    def prepare(self) -> None:
        """Do nothing: folders are only names, and the first object shows whether it can be written."""

    def names(self) -> list[str]:
        """Return the names of the objects."""
        parts = [part for part in self._below.split("/") if part]
        return ["/".join(entry["path"].split("/")[len(parts) :]) for entry in self._list(parts)]

    def begin(self, name: str) -> BinaryIO:  # noqa: ARG002  (it gets its name when it is whole)
        """Return a file to write."""
        return cast("BinaryIO", tempfile.TemporaryFile(prefix="sage-"))

    def finish(self, file: BinaryIO, name: str) -> None:
        """Put a file into the store."""
        with file, _failures():
            file.seek(0)
            self._store.put(self._full(name), file)

    def discard(self, file: BinaryIO, name: str) -> None:  # noqa: ARG002  (the store does not have it)
        """Drop the file without a name, without a request that a store may not answer."""
        with suppress(OSError):
            file.close()

    def rename(self, name: str, new: str) -> None:
        """Copy an object, which a store does by itself, and remove the old one."""
        with _failures():
            self._store.copy(self._full(name), self._full(new))
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove an object."""
        with suppress(FileNotFoundError), _failures():  # S3 does not say that it was not there; others do
            self._store.delete(self._full(name))

    def sync(self, names: Sequence[str]) -> None:
        """Do nothing: an object is durable when it was put."""


class _Object(io.RawIOBase):
    """The bytes of an object, each read with a request of its own."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read as much as there is room for."""
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        with _failures():
            data = self._store.get_range(self._key, start=self._at, length=count)
        buffer[: len(data)] = memoryview(data)
        self._at += len(data)
        return len(data)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a pattern as `glob` takes it: "**" stands for any folders, and none is hidden."""
    if not pattern or not names:
        return not pattern and not names
    first, *others = pattern
    is_hidden = names[0].startswith(".") and not first.startswith(".")
    if first == "**":
        return _matches(names, others) or (not is_hidden and _matches(names[1:], pattern if names[1:] else others))
    return not is_hidden and fnmatchcase(names[0], first) and _matches(names[1:], others)


@contextmanager
def _failures() -> Iterator[None]:
    """Let errors of the store be errors of the system, of one line and without the library's own account."""
    library = load("obstore.exceptions", "objects")
    try:
        yield
    except (library.BaseError, FileNotFoundError) as error:
        text = " ".join(str(error).partition("\n\nDebug source")[0].split())
        text = text if len(text) <= ERROR_CHARS_MAX else f"{text[:ERROR_CHARS_MAX]}..."
        is_object = isinstance(error, FileNotFoundError) and not NO_BUCKET.search(text)
        raise (FileNotFoundError if is_object else OSError)(text) from None
