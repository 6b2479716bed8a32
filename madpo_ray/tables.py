"""The rows of an artifact: Parquet files whose names keep their order."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from ray.data import SaveMode
from ray.data.datasource import FilenameProvider


class _OrderedNames(FilenameProvider):  # type: ignore[misc]
    """File names that follow the order of the rows, with nothing random in them."""

    def __init__(self) -> None:
        super().__init__(file_format="parquet")

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"part-{task_index:06}.parquet"


def write_rows(dataset: Any, folder: Path) -> None:
    """Writes a Ray dataset to a fresh folder, in its order."""
    # Appending would demand a random part in each name; there is nothing to overwrite.
    dataset.write_parquet(str(folder), filename_provider=_OrderedNames(), mode=SaveMode.OVERWRITE)


def parquet_folder(artifact: Path) -> Path:
    """Where a stage's folder keeps its rows."""
    return artifact / "data"


def read_split(data: Path, split: str, columns: tuple[str, ...]) -> pa.Table:
    """Columns of one split's rows, in the order of the files."""
    files = sorted(str(path) for path in data.glob("*.parquet"))
    return pyarrow.dataset.dataset(files, format="parquet").to_table(list(columns), filter=pc.field("split") == split)


def read_split_whole(data: Path, split: str, columns: tuple[str, ...]) -> pa.Table:
    """The same with each column in one piece: taking a few rows out of many pieces copies all of them, each time."""
    table = read_split(data, split, columns)
    # Offsets of 64 bits: a large data set has more than 2^31 tokens.
    types = [
        pa.large_list(field.type.value_type) if pa.types.is_list(field.type) else field.type for field in table.schema
    ]
    wide = pa.schema([field.with_type(wider) for field, wider in zip(table.schema, types, strict=True)])
    return table.cast(wide).combine_chunks()


def count_rows(data: Path) -> int:
    """Rows of all files, from their footers."""
    return int(pyarrow.dataset.dataset(str(data), format="parquet").count_rows())
