"""Files of preference pairs: where they are, how they are opened, what a source of them yields.

A file is on a disk that every node sees, or in a store that pyarrow reads: `s3://`, `gs://`, and
`hf://` for the Hugging Face hub. Credentials come from the environment, as each store's own tools
take them.
"""

import contextlib
import functools
import io
import os
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

# What pyarrow and the hub's library raise for a store that cannot be reached or read.
READ_ERRORS = (OSError, pa.ArrowException, ValueError)

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

        Instead of a row that cannot be read, the reason: what it is, and after ": " its values.
        """

    def count(self) -> int:
        """An upper bound of the number of rows, without reading their values."""


@dataclass(frozen=True)
class DataFile:
    """One file, by the name that the config gives it: a path, or a URI."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        """The name without what follows a path in a URI."""
        return self.name.partition("?")[0] if is_remote(self.name) else self.name

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
            system, path = file_system(self.name)
            return bool(system.get_file_info(path).is_file)

    def open(self) -> pa.NativeFile:
        """Its bytes, in any order."""
        if not is_remote(self.name):
            return pa.OSFile(self.name)
        system, path = file_system(self.name)
        return system.open_input_file(path)

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

        Raises:
            UserError: the store cannot be reached.
        """
        if not is_remote(self.name):
            return hash_file(Path(self.name))
        with explaining(self.name):
            system, path = file_system(self.name)
            if isinstance(system, pyarrow.fs.PyFileSystem):  # the hub's: a file's hash by git
                return str(system.handler.fs.info(path)["blob_id"])
            info = system.get_file_info(path)
            return f"{info.size} bytes of {info.mtime_ns}"


@functools.cache
def file_system(name: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The store of a URI, and the file's path in it."""
    system, path = pyarrow.fs.FileSystem.from_uri(name)
    return system, path


@contextlib.contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turns what a store raises inside the block into a UserError that names the file."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(f"data.files: {name} cannot be read: {error}") from None
