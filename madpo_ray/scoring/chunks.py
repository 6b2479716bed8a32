"""Scored pairs on the disk: what a killed pass has scored is not scored again."""

import hashlib
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from madpo_ray.atomic import sync
from madpo_ray.columns import PAIR_ID, REASON

logger = logging.getLogger(__name__)

RAISED = "raised "  # how the reason of an exception begins


class ScoredChunks:
    """A folder with one file per chunk of pairs, named by them.

    After the first `find`, chunks of other processes are found only under the same pair_ids.

    Args:
        folder: one that every node mounts; for these pairs only.
        names: columns of the scores. Files without one of them are passed over.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = [PAIR_ID, *names, REASON]
        self._known: pa.Table | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, ids: pa.ChunkedArray, *, with_failed: bool = False) -> pa.Table | None:
        """The scores of those pairs that have some, in any order; None if none has.

        Args:
            with_failed: also pairs for which a scorer raised an exception, which may succeed if it
                is tried again.
        """
        own = self._read(self._path(ids))
        if own is not None and own[PAIR_ID].to_pylist() != ids.to_pylist():
            own = None
        if own is not None and not pc.any(_has_raised(own)).as_py():
            return own

        # In other chunks; a pair that failed may have succeeded since.
        known = self._all_known()
        found = known.filter(pc.is_in(known[PAIR_ID], value_set=ids))
        if own is not None:
            found = pa.concat_tables([found, own])
        has_raised = _has_raised(found)
        candidates = [found.filter(pc.invert(has_raised))]
        if with_failed:
            candidates.append(found.filter(has_raised))
        return _first_of_each(pa.concat_tables(candidates), ids)

    def has_scores(self) -> bool:
        """Whether any pair has scores by now, whoever gave them."""
        tables = (self._read(path) for path in self._files())
        return any(table is not None and table[REASON].null_count for table in tables)

    def write(self, scored: pa.Table) -> None:
        """Keeps the scores of a chunk."""
        path = self._path(scored[PAIR_ID])
        partial = self._folder / f".{path.name}.{uuid.uuid4().hex}"
        pq.write_table(scored, partial)
        sync(partial)
        os.replace(partial, path)
        sync(self._folder)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[!.]*.parquet"))

    def _all_known(self) -> pa.Table:
        if self._known is None:
            tables = [table for path in self._files() if (table := self._read(path)) is not None]
            numbers = dict.fromkeys(self._names[1:-1], pa.array([], "double"))
            texts = pa.array([], "string")
            empty = pa.table({PAIR_ID: texts, **numbers, REASON: texts})
            self._known = pa.concat_tables(tables) if tables else empty
        return self._known

    def _read(self, path: Path) -> pa.Table | None:
        """A file's scores; None if it is missing, damaged, or of other columns."""
        try:
            with pq.ParquetFile(path) as file:
                if not set(self._names) <= set(file.schema_arrow.names):
                    return None
                return file.read(self._names)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            logger.warning("%s cannot be read, so its pairs are scored again: %s", path, error)
            return None

    def _path(self, ids: pa.ChunkedArray) -> Path:
        content = "\n".join([*self._names, *ids.to_pylist()])
        return self._folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.parquet"


def _has_raised(scored: pa.Table) -> pa.ChunkedArray:
    """Whether a scorer raised an exception for a pair."""
    return pc.fill_null(pc.match_substring(scored[REASON], RAISED), False)


def _first_of_each(scored: pa.Table, ids: pa.ChunkedArray) -> pa.Table | None:
    """The first row of each of these pairs that has one; None if none has."""
    places = pc.index_in(ids, value_set=scored[PAIR_ID].combine_chunks()).drop_null()
    return scored.take(places) if len(places) else None


def in_order_of(scored: pa.Table, ids: pa.ChunkedArray) -> pa.Table:
    """The rows with these pair_ids, in their order.

    Raises:
        RuntimeError: some are missing (names the first).
    """
    places = pc.index_in(ids, value_set=scored[PAIR_ID].combine_chunks())
    if places.null_count:
        missing = ids.filter(pc.is_null(places))
        raise RuntimeError(f"{len(missing)} pairs have no scores, such as {missing[0]}")
    return scored.take(places)
