"""Files of preference pairs: one class per kind of file, and `open_source` as the only door."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from madpo_ray.data.strict_json import parse_json
from madpo_ray.errors import UserError

ROWS_PER_BATCH = 1024
# Rows whose keys are the columns of a JSON Lines file.
ROWS_WITH_KEYS = 100
# A line without an end is not read into memory completely.
MAX_LINE_BYTES = 64 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How files begin that are not JSON Lines.
_OTHER_KINDS = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file (git lfs pull)",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}

Row = dict[str, Any]


class Source(Protocol):
    """One file of rows. Made from its path; nothing is read before a method is called."""

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path) -> None: ...

    def columns(self) -> list[str] | None:
        """The file's columns, or None if it has no readable row. Raises UserError."""

    def rows(self) -> Iterator[Row | str]:
        """The rows in order.

        Instead of a row that cannot be read, the reason: what it is, and after ": " its values.
        """

    def count(self) -> int:
        """An upper bound of the number of rows, without reading their values."""


class ParquetSource:
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str] | None:
        try:
            names = list(pq.read_schema(self._path).names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"data.files: {self._path} is not a readable Parquet file ({error})"
            ) from None
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"data.files: {self._path} has two columns {name!r}: rename one")
        return names

    def rows(self) -> Iterator[Row | str]:
        batches = pq.ParquetFile(self._path).iter_batches(batch_size=ROWS_PER_BATCH)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                yield f"the rest of the file cannot be read: {error}"
                return
            if batch is None:
                return
            for i in range(batch.num_rows):
                yield _parquet_row(batch.slice(i, 1))

    def count(self) -> int:
        return int(pq.read_metadata(self._path).num_rows)


def _parquet_row(batch: pa.RecordBatch) -> Row | str:
    try:
        row: Row = batch.to_pylist(maps_as_pydicts="strict")[0]
    except (ValueError, OverflowError, pa.ArrowException) as error:  # such as a date of year 10000
        return f"a value cannot be read: {error}"
    return row


class JSONLinesSource:
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str] | None:
        """The keys of the first lines that are JSON objects: a key may be left out of some."""
        self._check_kind()
        objects = (row for row in self.rows() if isinstance(row, dict))
        first = list(itertools.islice(objects, ROWS_WITH_KEYS))
        return list(dict.fromkeys(key for row in first for key in row)) if first else None

    def _check_kind(self) -> None:
        """Raises UserError for a file of another kind under this suffix."""
        with self._path.open("rb") as stream:
            head = stream.read(1024).removeprefix(BYTE_ORDER_MARK)
        for start, what in _OTHER_KINDS.items():
            if head.startswith(start):
                raise UserError(f"data.files: {self._path} {what}")
        if head.lstrip().startswith(b"["):
            raise UserError(
                f"data.files: {self._path} is a JSON array, not JSON Lines: write one object per "
                f"line (jq -c '.[]' {self._path.name})"
            )

    def rows(self) -> Iterator[Row | str]:
        with self._path.open("rb") as stream:
            if stream.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
                stream.seek(0)
            while line := stream.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    _skip_line(stream)
                    yield f"line is longer than {MAX_LINE_BYTES // 2**20} MiB"
                else:
                    yield _json_row(line)

    def count(self) -> int:
        with self._path.open("rb") as stream:
            return sum(1 for _ in stream)


def _skip_line(stream: Any) -> None:
    while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _json_row(line: bytes) -> Row | str:
    try:
        row, repeated = parse_json(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"line is not JSON: {error}"
    if repeated is not None:
        return f"a key appears twice: {repeated!r}"
    return row if isinstance(row, dict) else "line is not a JSON object"


KINDS: tuple[type[Source], ...] = (ParquetSource, JSONLinesSource)


def open_source(name: str) -> Source:
    """The source of a name in `data.files`.

    Raises:
        UserError: the file is missing or of an unknown kind.
    """
    path = Path(name)
    known = " or ".join(suffix for kind in KINDS for suffix in kind.suffixes)
    if path.is_dir():
        raise UserError(f"data.files: {path} is a folder: list its {known} files")
    if not path.is_file():
        hint = f"; patterns are not expanded, list the {known} files" if "*" in name else ""
        raise UserError(f"data.files: {path} does not exist{hint}")
    for kind in KINDS:
        if path.suffix.lower() in kind.suffixes:
            return kind(path)
    raise UserError(f"data.files: {path.name} must end in {known}")
