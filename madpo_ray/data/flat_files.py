"""The tokens and texts of a split as flat files, of which single rows are read.

Pairs are trained on in a shuffled order. Parquet cannot give one row, and a table in memory has the
size of the data, in every process.
"""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.compute as pc

from madpo_ray.artifacts.tables import split_batches
from madpo_ray.atomic import sync

TOKEN = np.dtype(np.int32)
OFFSET = np.dtype(np.int64)


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
        sizes = ends[-1] * TOKEN.itemsize
        missing = [
            name for name, size in zip(names, sizes, strict=True) if _size(folder / name) != size
        ]
        if missing:
            _write_tokens(folder, rows, split, missing)
        self._files = [os.open(folder / name, os.O_RDONLY) for name in names]

    def read(self, row: int) -> list[np.ndarray]:
        """The tokens of a row, one array per column."""
        return [
            np.frombuffer(os.pread(file, length * TOKEN.itemsize, start * TOKEN.itemsize), TOKEN)
            for file, start, length in zip(
                self._files, self._starts[row], self._lengths[row], strict=True
            )
        ]

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _write_tokens(folder: Path, rows: Path, split: str, names: Sequence[str]) -> None:
    """Writes one file per column. Another process may write the same at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    partials = [folder / f".{name}.{uuid.uuid4().hex}" for name in names]
    streams = [path.open("wb") for path in partials]
    try:
        for table in split_batches(rows, split, names):
            for name, stream in zip(names, streams, strict=True):
                values = pc.list_flatten(table[name])
                for chunk in values.chunks:
                    chunk.to_numpy().astype(TOKEN, copy=False).tofile(stream)
    finally:
        for stream in streams:
            stream.close()
    for partial, name in zip(partials, names, strict=True):
        sync(partial)  # after a power loss the size alone would look complete
        os.replace(partial, folder / name)


class TextFiles:
    """Rows of a split's text columns, read by number.

    Args:
        folder: holds two files per column, the texts and where each one ends; missing ones are made
            from the rows.
        rows: folder of Parquet files.
        names: the text columns.
    """

    def __init__(self, folder: Path, rows: Path, split: str, names: Sequence[str]) -> None:
        missing = [name for name in names if not _is_complete(folder, name)]
        if missing:
            _write_texts(folder, rows, split, missing)
        self._texts = [os.open(folder / name, os.O_RDONLY) for name in names]
        self._ends = [np.memmap(_ends_file(folder, name), OFFSET, "r") for name in names]

    def read(self, row: int) -> list[str]:
        """The texts of a row, one per column."""
        texts = []
        for file, ends in zip(self._texts, self._ends, strict=True):
            start = int(ends[row - 1]) if row else 0
            texts.append(os.pread(file, int(ends[row]) - start, start).decode())
        return texts

    def close(self) -> None:
        for file in self._texts:
            os.close(file)


def _ends_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.ends"


def _is_complete(folder: Path, name: str) -> bool:
    """Whether both files are there, and the texts end where the last one does."""
    texts = folder / name
    ends = _ends_file(folder, name)
    if not texts.exists() or not ends.exists():
        return False
    last = np.fromfile(ends, OFFSET)[-1:]
    return texts.stat().st_size == int(last.sum())


def _write_texts(folder: Path, rows: Path, split: str, names: Sequence[str]) -> None:
    """Writes two files per column. Another process may write the same at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [place for name in names for place in (_ends_file(folder, name), folder / name)]
    partials = [folder / f".{place.name}.{uuid.uuid4().hex}" for place in places]
    streams = [path.open("wb") for path in partials]
    try:
        _write_text_columns(streams, rows, split, names)
    finally:
        for stream in streams:
            stream.close()
    for partial, place in zip(partials, places, strict=True):
        sync(partial)  # after a power loss they would look complete
        os.replace(partial, place)


def _write_text_columns(
    streams: Sequence[BinaryIO], rows: Path, split: str, names: Sequence[str]
) -> None:
    """Writes to two streams per column, the ends and the texts."""
    sizes = [0] * len(names)
    for table in split_batches(rows, split, names):
        for i, name in enumerate(names):
            texts = [text.encode() for text in table[name].to_pylist()]
            ends = sizes[i] + np.cumsum([len(text) for text in texts], dtype=OFFSET)
            ends.tofile(streams[2 * i])
            streams[2 * i + 1].write(b"".join(texts))
            sizes[i] = int(ends[-1]) if len(ends) else sizes[i]
