"""Parquet and Arrow files of preference pairs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from madpo_ray.data.rows import DAMAGED, ROWS_PER_BATCH, Row
from madpo_ray.errors import UserError

READ_ERRORS = (pa.ArrowException, OSError)
IPC_FILE_MAGIC = b"ARROW1"


class ParquetSource:
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    has_types: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str] | None:
        try:
            names = pq.read_schema(self._path).names
        except READ_ERRORS as error:
            raise UserError(
                f"data.files: {self._path} is not a readable Parquet file ({error})"
            ) from None
        return _unique(names, self._path)

    def rows(self) -> Iterator[Row | str]:
        return _rows(pq.ParquetFile(self._path).iter_batches(batch_size=ROWS_PER_BATCH))

    def count(self) -> int:
        return int(pq.read_metadata(self._path).num_rows)


class ArrowSource:
    """Arrow's IPC files and streams; Feather is the former, `datasets` writes the latter."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather")
    has_types: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str] | None:
        try:
            with pa.memory_map(str(self._path)) as source, self._open(source) as reader:
                names = reader.schema.names
        except READ_ERRORS as error:
            raise UserError(
                f"data.files: {self._path} is not a readable Arrow file ({error})"
            ) from None
        return _unique(names, self._path)

    def rows(self) -> Iterator[Row | str]:
        return _rows(self._batches())

    def count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self._path)) as source, self._open(source) as reader:
            if isinstance(reader, pa.ipc.RecordBatchStreamReader):
                yield from reader
            else:
                yield from map(reader.get_batch, range(reader.num_record_batches))

    def _open(
        self, source: pa.MemoryMappedFile
    ) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        is_file = source.read(len(IPC_FILE_MAGIC)) == IPC_FILE_MAGIC
        source.seek(0)
        return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _unique(names: Sequence[str], path: Path) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.files: {path} has two columns {name!r}: rename one")
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
    return row
