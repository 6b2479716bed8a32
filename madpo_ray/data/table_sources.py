"""Parquet and Arrow files of preference pairs."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from madpo_ray.data.files import (
    DAMAGED,
    READ_ERRORS,
    ROWS_PER_BATCH,
    WHOLE,
    DataFile,
    Piece,
    Row,
)
from madpo_ray.errors import UserError

IPC_FILE_MAGIC = b"ARROW1"


class ParquetSource:
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    has_types: ClassVar[bool] = True

    def __init__(self, file: DataFile) -> None:
        self._file = file

    def columns(self) -> list[str] | None:
        try:
            with self._open() as parquet:
                names = parquet.schema_arrow.names
        except READ_ERRORS as error:
            raise UserError(
                f"data.files: {self._file} is not a readable Parquet file ({error})"
            ) from None
        return _unique(names, self._file)

    def pieces(self) -> list[Piece]:
        return [WHOLE]

    def rows(self, piece: Piece = WHOLE) -> Iterator[Row | str]:
        return _rows(self._open().iter_batches(batch_size=ROWS_PER_BATCH))

    def count(self) -> int:
        with self._open() as parquet:
            return int(parquet.metadata.num_rows)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._file.open())


class ArrowSource:
    """Arrow's IPC files and streams; Feather is the former, `datasets` writes the latter."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather")
    has_types: ClassVar[bool] = True

    def __init__(self, file: DataFile) -> None:
        self._file = file

    def columns(self) -> list[str] | None:
        try:
            with self._file.open() as source, self._open(source) as reader:
                names = reader.schema.names
        except READ_ERRORS as error:
            raise UserError(
                f"data.files: {self._file} is not a readable Arrow file ({error})"
            ) from None
        return _unique(names, self._file)

    def pieces(self) -> list[Piece]:
        return [WHOLE]

    def rows(self, piece: Piece = WHOLE) -> Iterator[Row | str]:
        return _rows(self._batches())

    def count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self._file.open() as source, self._open(source) as reader:
            if isinstance(reader, pa.ipc.RecordBatchStreamReader):
                yield from reader
            else:
                yield from map(reader.get_batch, range(reader.num_record_batches))

    def _open(
        self, source: pa.NativeFile
    ) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        is_file = source.read(len(IPC_FILE_MAGIC)) == IPC_FILE_MAGIC
        source.seek(0)
        return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _unique(names: Sequence[str], file: DataFile) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.files: {file} has two columns {name!r}: rename one")
    return list(names)


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Row | str]:
    while True:
        try:
            batch = next(batches, None)
        except READ_ERRORS as error:
            yield f"{DAMAGED}: {error}"
            return
        if batch is None:
            return
        for i in range(batch.num_rows):
            yield _row(batch.slice(i, 1))


def _row(batch: pa.RecordBatch) -> Row | str:
    try:
        row: Row = batch.to_pylist(maps_as_pydicts="strict")[0]
    except (ValueError, OverflowError, pa.ArrowException) as error:  # such as a date of year 10000
        return f"a value cannot be read: {error}"
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Nested keys without a value are those that other rows have: a column has one type."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value
