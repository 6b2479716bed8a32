"""The tokens of a split as flat files, of which single rows are read.

Pairs are trained on in a shuffled order. Parquet cannot give one row, and a table in memory has the
size of the data, in every process.
"""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from madpo_ray.artifacts.tables import split_batches
from madpo_ray.atomic import sync

DTYPE = np.dtype(np.int32)


class TokenFiles:
    """Rows of a split's token columns, read by number.

    Args:
        folder: holds one file per column; a missing one is made from the rows.
        rows: folder of Parquet files.
        names: the token columns.
        lengths: their numbers of tokens, (pairs, len(names)).
    """

    def __init__(
        self, folder: Path, rows: Path, split: str, names: Sequence[str], lengths: np.ndarray
    ) -> None:
        ends = np.cumsum(lengths, axis=0)
        self._starts = ends - lengths
        self._lengths = lengths
        sizes = ends[-1] * DTYPE.itemsize
        missing = [
            name for name, size in zip(names, sizes, strict=True) if _size(folder / name) != size
        ]
        if missing:
            _write(folder, rows, split, missing)
        self._files = [os.open(folder / name, os.O_RDONLY) for name in names]

    def read(self, row: int) -> list[np.ndarray]:
        """The tokens of a row, one array per column."""
        return [
            np.frombuffer(os.pread(file, length * DTYPE.itemsize, start * DTYPE.itemsize), DTYPE)
            for file, start, length in zip(
                self._files, self._starts[row], self._lengths[row], strict=True
            )
        ]

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _write(folder: Path, rows: Path, split: str, names: Sequence[str]) -> None:
    """Writes one file per column. Another process may write the same at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    partials = [folder / f".{name}.{uuid.uuid4().hex}" for name in names]
    streams = [path.open("wb") for path in partials]
    try:
        for table in split_batches(rows, split, names):
            for name, stream in zip(names, streams, strict=True):
                values = pc.list_flatten(table[name])
                for chunk in values.chunks:
                    chunk.to_numpy().astype(DTYPE, copy=False).tofile(stream)
    finally:
        for stream in streams:
            stream.close()
    for partial, name in zip(partials, names, strict=True):
        sync(partial)  # after a power loss the size alone would look complete
        os.replace(partial, folder / name)
