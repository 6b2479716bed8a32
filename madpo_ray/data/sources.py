"""Files of preference pairs: one class per kind of file, and `open_source` as the only door."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from madpo_ray.errors import UserError

ROWS_PER_BATCH = 1024
Row = dict[str, Any]


class Source(Protocol):
    """One file of rows. Made from its path; nothing is read before a method is called."""

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path) -> None: ...

    def columns(self) -> list[str] | None:
        """The file's columns, or None if it has no readable row. Raises UserError."""

    def rows(self) -> Iterator[Row | str]:
        """The rows in order; instead of a row that cannot be read, the reason."""

    def count(self) -> int:
        """An upper bound of the number of rows, without reading their values."""


class ParquetSource:
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str] | None:
        try:
            return list(pq.read_schema(self._path).names)
        except pa.ArrowInvalid as error:
            raise UserError(f"data.files: {self._path} is not a Parquet file ({error})") from None

    def rows(self) -> Iterator[Row | str]:
        for batch in pq.ParquetFile(self._path).iter_batches(batch_size=ROWS_PER_BATCH):
            yield from batch.to_pylist()

    def count(self) -> int:
        return int(pq.read_metadata(self._path).num_rows)


class JSONLinesSource:
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str] | None:
        """The keys of the first line that is a JSON object."""
        first = next((row for row in self.rows() if isinstance(row, dict)), None)
        return None if first is None else list(first)

    def rows(self) -> Iterator[Row | str]:
        with self._path.open("rb") as stream:
            for line in stream:
                try:
                    row = json.loads(line.decode("utf-8"))
                except ValueError as error:
                    yield f"line is not JSON: {error}"
                    continue
                yield row if isinstance(row, dict) else "line is not a JSON object"

    def count(self) -> int:
        with self._path.open("rb") as stream:
            return sum(1 for _ in stream)


KINDS: tuple[type[Source], ...] = (ParquetSource, JSONLinesSource)


def open_source(name: str) -> Source:
    """The source behind a name in `data.files`.

    Raises:
        UserError: the file is missing or of an unknown kind.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"data.files: {path} does not exist")
    for kind in KINDS:
        if path.suffix in kind.suffixes:
            return kind(path)
    known = " or ".join(suffix for kind in KINDS for suffix in kind.suffixes)
    raise UserError(f"data.files: {path.name} must end in {known}")
