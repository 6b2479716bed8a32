"""Scored chunks on the disk: what a killed pass has scored is not scored again."""

import hashlib
import logging
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from madpo_ray.atomic import sync
from madpo_ray.columns import PAIR_ID

logger = logging.getLogger(__name__)


class ScoredChunks:
    """A folder with one file per chunk, named by the chunk's pairs.

    Args:
        folder: one that every node mounts; for these pairs and these scorers only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, ids: pa.ChunkedArray) -> pa.Table | None:
        """The scores of a chunk of pairs, or None if they are not there, or cannot be read."""
        path = self._path(ids)
        try:
            table = pq.read_table(path, partitioning=None)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            logger.warning("%s cannot be read, so its pairs are scored again: %s", path, error)
            return None
        return table if table[PAIR_ID].to_pylist() == ids.to_pylist() else None

    def write(self, scored: pa.Table) -> None:
        """Keeps the scores of a chunk."""
        path = self._path(scored[PAIR_ID])
        partial = self._folder / f".{path.name}.{uuid.uuid4().hex}"
        pq.write_table(scored, partial)
        sync(partial)
        os.replace(partial, path)

    def count(self) -> int:
        """How many chunks are there."""
        return len(list(self._folder.glob("[!.]*.parquet")))

    def _path(self, ids: pa.ChunkedArray) -> Path:
        name = hashlib.sha256("\n".join(ids.to_pylist()).encode()).hexdigest()[:32]
        return self._folder / f"{name}.parquet"
