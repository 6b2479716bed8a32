"""Files of preference pairs: where they are, how they are opened, what a source of them yields.

A file is on a disk that every node sees, or in a store that pyarrow reads: `s3://`, `gs://`, and
`hf://` for the Hugging Face hub. Credentials come from the environment, as each store's own tools
take them.
"""

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.fs

from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.config import is_remote
from madpo_ray.errors import UserError

ROWS_PER_BATCH = 1024
# A line, or an object of a JSON array, without an end is not read into memory completely.
MAX_LINE_BYTES = 64 * 2**20

READ_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# The kind of reason after which a file has no more rows.
DAMAGED = "the rest of the file cannot be read"
# Instead of a row: a line with nothing on it, which is no row but counts as a line.
BLANK = ""

# What pyarrow raises for a file, or a store, that cannot be read.
READ_ERRORS = (OSError, pa.ArrowException)
# At the end of a URI: a question mark may also be part of a name.
_OPTIONS = re.compile(r"\?\w+=[^/]*$")
ANONYMOUS = "anonymous@"

Row = dict[str, Any]


class Piece(NamedTuple):
    """A part of a file that begins with a row."""

    start: int  # bytes
    stop: int | None  # bytes; None: the file's end
    first_row: int


WHOLE = Piece(0, None, 0)


class Source(Protocol):
    """One file of rows. Nothing is read before a method is called.

    Attributes:
        suffixes: how the names of such files end.
        has_types: whether a number is a number; otherwise every value is text.
    """

    suffixes: ClassVar[tuple[str, ...]]
    has_types: ClassVar[bool]

    def columns(self) -> list[str] | None:
        """The file's columns, or None if it has no readable row. Raises UserError."""

    def pieces(self) -> list[Piece]:
        """Parts that can be read at the same time, in order; the whole if it cannot be cut."""

    def rows(self, piece: Piece = WHOLE) -> Iterator[Row | str]:
        """The rows in order.

        Instead of a row that cannot be read, the reason: what it is, and after ": " its values;
        BLANK for an empty line.
        """

    def count(self) -> int:
        """An upper bound of the number of rows."""


@dataclass(frozen=True)
class DataFile:
    """One file, by the name that the config gives it: a path, or a URI."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        """Where it is on the disk, or in its store."""
        return StoreUri.of(self.name).path if is_remote(self.name) else self.name

    @property
    def suffix(self) -> str:
        """The last one, such as `.gz`, in lower case."""
        return os.path.splitext(self.path)[1].lower()

    def ends_with(self, suffixes: tuple[str, ...]) -> bool:
        return self.path.lower().endswith(suffixes)

    def exists(self) -> bool:
        """Whether there is such a file, and not a folder. Raises UserError for a store's errors."""
        if not is_remote(self.name):
            return Path(self.name).is_file()
        with explaining(self.name):
            place = StoreUri.of(self.name)
            return bool(place.system.get_file_info(place.path).is_file)

    def open(self) -> pa.NativeFile:
        """Its bytes, in any order. Raises OSError, also for a store's errors."""
        if not is_remote(self.name):
            return pa.OSFile(self.name)
        place = StoreUri.of(self.name)
        return place.system.open_input_file(place.path)

    def open_text(self) -> io.BufferedReader:
        """Its bytes from the beginning on, unpacked, without a byte order mark."""
        source = self.open()
        if compression := COMPRESSIONS.get(self.suffix):
            source = pa.CompressedInputStream(source, compression)
        stream = io.BufferedReader(source, READ_BYTES)
        if stream.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
            stream.read(len(BYTE_ORDER_MARK))
        return stream

    def version(self) -> str:
        """What changes with the content: a hash, or for a store without one size and time.

        A store is asked once per process, until `forget_versions`.

        Raises:
            UserError: the store cannot be reached.
        """
        return _remote_version(self.name) if is_remote(self.name) else hash_file(Path(self.name))


@functools.cache
def _remote_version(name: str) -> str:
    with explaining(name):
        place = StoreUri.of(name)
        if place.store == "hf":
            return str(place.system.handler.fs.info(place.path, refresh=True)["blob_id"])
        info = place.system.get_file_info(place.path)
        return f"{info.size} bytes of {info.mtime_ns}"


def forget_versions() -> None:
    """Lets stores be asked again: after reading, to see that nothing has changed meanwhile."""
    _remote_version.cache_clear()


class StoreUri(NamedTuple):
    """Where a URI points to."""

    store: str
    user: str  # `anonymous@` for a public bucket that is read without credentials, or nothing
    path: str  # for s3 and gs it begins with the bucket
    options: str  # such as `?endpoint_override=localhost:9000`, or nothing

    @classmethod
    def of(cls, name: str) -> "StoreUri":
        """The parts of a URI."""
        store, _, rest = name.partition("://")
        user = ANONYMOUS if rest.startswith(ANONYMOUS) else ""
        rest = rest.removeprefix(user)
        options = _OPTIONS.search(rest)
        if options is None:
            return cls(store, user, rest, "")
        return cls(store, user, rest[: options.start()], options.group())

    @property
    def system(self) -> pyarrow.fs.FileSystem:
        """The store. Raises pa.ArrowInvalid if pyarrow does not know an option."""
        bucket = "" if self.store == "hf" else self.path.partition("/")[0]
        return _file_system(f"{self.store}://{self.user}{bucket}{self.options}")

    def uri(self, path: str) -> str:
        """The URI of another path in the same store."""
        return f"{self.store}://{self.user}{path}{self.options}"


@functools.cache
def _file_system(bucket: str) -> pyarrow.fs.FileSystem:
    system, _ = pyarrow.fs.FileSystem.from_uri(bucket)
    return system


@contextlib.contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turns what a store raises inside the block into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The hub's client passes on what its libraries for HTTP raise.
        if isinstance(error, READ_ERRORS) or name.startswith("hf://"):
            raise UserError(f"data.files: {name} cannot be read: {error}") from None
        raise
