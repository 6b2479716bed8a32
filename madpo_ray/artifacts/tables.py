"""The rows of an artifact: Parquet files in a folder, whose names keep their order."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.manifest import read_manifest

ROWS_PER_READ = 16_384
METADATA_KEY = "madpo_ray"


def rows_folder(artifact: Path) -> Path:
    """Where a stage's folder keeps its rows."""
    return artifact / "data"


def rows_fingerprint(rows: Path) -> str:
    """The fingerprint of the artifact that the rows are of; a name if it is being built."""
    manifest = read_manifest(rows.parent)
    return "unfinished" if manifest is None else str(manifest["fingerprint"])


def rows_files(rows: Path) -> list[Path]:
    """The Parquet files of a folder of rows, in the order of the rows.

    Those that the artifact's manifest lists: a copied file next to them is none, and a network file
    system may show an old listing. All of them as long as the artifact is being built.
    """
    manifest = read_manifest(rows.parent)
    if manifest is None:
        return sorted(rows.glob("*.parquet"))
    files = (rows.parent / name for name in manifest["files"])
    return sorted(file for file in files if file.parent == rows and file.suffix == ".parquet")


def read_columns(rows: Path, names: Sequence[str]) -> pa.Table:
    """Columns of all rows, in order."""
    return _dataset(rows).to_table(list(names))


def read_split(rows: Path, split: str, names: Sequence[str]) -> pa.Table:
    """Columns of one split's rows, in order."""
    return read_splits(rows, [split], names)


def read_splits(rows: Path, splits: Sequence[str], names: Sequence[str]) -> pa.Table:
    """Columns of the rows of some splits, in order."""
    is_wanted = pc.field(columns.SPLIT).isin(list(splits))
    return _dataset(rows).to_table(list(names), filter=is_wanted)


def read_split_contiguous(rows: Path, split: str, names: Sequence[str]) -> pa.Table:
    """`read_split` with each column in one piece.

    Taking a few rows out of a column in many pieces copies the complete column, each time.
    """
    table = read_split(rows, split, names)
    # 64-bit offsets: a large data set has more than 2^31 tokens.
    fields = [
        field.with_type(pa.large_list(field.type.value_type))
        if pa.types.is_list(field.type)
        else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields)).combine_chunks()


def split_batches(rows: Path, split: str, names: Sequence[str]) -> Iterator[pa.Table]:
    """`read_split` in pieces, of which one is in memory."""
    for file in rows_files(rows):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(ROWS_PER_READ, columns=[columns.SPLIT, *names]):
                table = pa.table(batch)
                yield table.filter(pc.equal(table[columns.SPLIT], split))


def first_row(rows: Path, names: Sequence[str]) -> dict[str, Any]:
    """Columns of the first row. Raises IndexError if there is none."""
    found: dict[str, Any] = _dataset(rows).head(1, columns=list(names)).to_pylist()[0]
    return found


def count_rows(rows: Path) -> int:
    """Rows of all files, from their footers."""
    return int(_dataset(rows).count_rows())


def column_names(rows: Path) -> list[str]:
    """The columns of the rows."""
    return list(_dataset(rows).schema.names)


def write_with_columns(
    rows: Path,
    added: pa.Table,
    output: Path,
    *,
    keep: pa.ChunkedArray | None = None,
    rows_per_file: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Copies `rows` to `output`, with the columns of `added`, row by row.

    One file is in memory at a time, and with `rows_per_file` the rows of the next one.

    Args:
        keep: which of all rows to copy, bool; None: each.
        rows_per_file: of the copy; None: as many as the files of `rows` have.
        metadata: goes as JSON into the schema of each file, below METADATA_KEY.

    Raises:
        RuntimeError: `added` has other pair_ids, or another number of rows.
    """
    output.mkdir(parents=True)
    tables = _with_columns(rows, added, keep)
    if rows_per_file is not None:
        tables = _resized(tables, rows_per_file)
    for number, table in enumerate(tables):
        if metadata is not None:
            table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
        pq.write_table(table, output / f"part-{number:06}.parquet")


def _with_columns(rows: Path, added: pa.Table, keep: pa.ChunkedArray | None) -> Iterator[pa.Table]:
    """One table per file of `rows`."""
    start = 0
    for file in rows_files(rows):
        table = pq.ParquetFile(file).read()
        part = added.slice(start, table.num_rows)
        if part[columns.PAIR_ID].to_pylist() != table[columns.PAIR_ID].to_pylist():
            raise RuntimeError(f"the scores do not belong to the pairs of {file}")
        for name in part.drop_columns([columns.PAIR_ID]).column_names:
            table = table.append_column(name, part[name])
        num_rows = table.num_rows
        if keep is not None:
            table = table.filter(keep.slice(start, num_rows))
        yield table
        start += num_rows
    if start != added.num_rows:
        raise RuntimeError(f"{added.num_rows} pairs were scored, and {rows} has {start}")


def _resized(tables: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many; the last has fewer."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows > num_rows:
            yield rest.slice(0, num_rows)
            rest = rest.slice(num_rows)
    if rest is not None:
        yield rest


def write_table(table: pa.Table, rows: Path) -> None:
    """Writes a table as the only file of a fresh folder of rows."""
    rows.mkdir(parents=True)
    pq.write_table(table, rows / "part-000000.parquet")


def _dataset(rows: Path) -> pyarrow.dataset.Dataset:
    files = [str(path) for path in rows_files(rows)]
    return pyarrow.dataset.dataset(files, format="parquet")
