"""One pass of Ray Data over tokenised rows: every actor loads the scorers once."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from ray.data.expressions import col

from madpo_ray.artifacts.tables import read_splits, rows_files
from madpo_ray.columns import LENGTHS, PAIR_ID, REASON, SPLIT, SPLITS
from madpo_ray.config import ActorPool
from madpo_ray.errors import UserError
from madpo_ray.models.devices import refusing_large_batches, refusing_large_models, use_device
from madpo_ray.passes import (
    BatchNotes,
    count_gpus,
    pool_options,
    received,
    refused,
    require_no_refusal,
)
from madpo_ray.scoring.chunks import ScoredChunks, in_order_of
from madpo_ray.scoring.progress import ScoringProgress
from madpo_ray.scoring.scorers import score_or_explain, share_batches

if TYPE_CHECKING:
    from madpo_ray.scoring.scorers import Scorer

logger = logging.getLogger(__name__)

# Blocks at least, whatever the number of actors: after a kill, scores are found by block.
MIN_BLOCKS = 16
# An actor gives up after this many failed pairs in this many batches, if none has succeeded: one
# batch may hold the only pairs that fail.
MAX_FAILURES = 16
MAX_FAILED_BATCHES = 3
BATCH_KEYS = "scoring.per_device_batch_size or scoring.max_tokens_per_device"


class ScoringActor:
    """Maps batches of rows to their pair_id, the scorers' columns, all float64, and a reason.

    A pair for which a scorer fails has NaN in its columns, and the reason why; null otherwise.

    Args:
        kept: folder where what was scored is kept, and looked for; None: it is not. Pairs for
            which a scorer raised an exception are tried again.
    """

    def __init__(
        self,
        scorers: Sequence["Scorer"],
        num_threads: int,
        notes: BatchNotes,
        kept: Path | None = None,
    ) -> None:
        self._notes = notes
        names = [name for scorer in scorers for name in scorer.columns]
        self._kept = None if kept is None else ScoredChunks(kept, names)
        self._num_failed = 0
        self._num_failed_batches = 0
        self._has_succeeded = False
        torch.set_num_threads(num_threads)
        self._scorers = scorers
        self._refusal = ""
        share_batches(scorers)
        try:
            device = use_device(count_gpus())
            with refusing_large_models():
                for scorer in scorers:
                    scorer.load(device)
        except UserError as error:
            self._refusal = str(error)

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self._refusal:
            return refused(rows, self._refusal, key=PAIR_ID)

        # What is known already.
        ids = rows[PAIR_ID]
        known = None if self._kept is None else self._kept.find(ids)
        if known is not None:
            rows = rows.filter(pc.invert(pc.is_in(ids, value_set=known[PAIR_ID])))
            if rows.num_rows == 0:
                return in_order_of(known, ids)

        # The rest.
        first, last = rows[PAIR_ID][0], rows[PAIR_ID][-1]
        with self._notes.working_on(f"the {rows.num_rows} pairs from {first} to {last}"):
            try:
                with refusing_large_batches(BATCH_KEYS):
                    scored = self._score(rows)
                self._require_success(scored)
            except UserError as error:
                self._refusal = str(error)
                return refused(rows, self._refusal, key=PAIR_ID)
        if self._kept is not None:
            self._kept.write(scored)
        return scored if known is None else in_order_of(pa.concat_tables([known, scored]), ids)

    def _require_success(self, scored: pa.Table) -> None:
        """Raises UserError if many pairs were tried, and none has scores."""
        reasons = scored[REASON]
        self._num_failed += len(reasons) - reasons.null_count
        self._num_failed_batches += reasons.null_count == 0
        self._has_succeeded = self._has_succeeded or reasons.null_count > 0
        is_early = self._num_failed < MAX_FAILURES or self._num_failed_batches < MAX_FAILED_BATCHES
        if self._has_succeeded or is_early:
            return
        # A pass that resumes tries those first that failed before; and other actors may succeed.
        self._has_succeeded = self._kept is not None and self._kept.has_scores()
        if not self._has_succeeded:
            raise UserError(
                f"none of the first {self._num_failed} pairs could be scored, such as "
                f"{scored[PAIR_ID][0]}: {reasons[0]}"
            )

    def _score(self, rows: pa.Table) -> pa.Table:
        scored: dict[str, Any] = {PAIR_ID: rows[PAIR_ID]}
        reasons = [""] * rows.num_rows
        for scorer in self._scorers:
            scores, own_reasons = score_or_explain(scorer, rows)
            for name, values in zip(scorer.columns, scores, strict=True):
                scored[name] = pa.array(values, type=pa.float64())
            both = zip(reasons, own_reasons, strict=True)
            reasons = ["; ".join(filter(None, pair)) for pair in both]
        scored[REASON] = pa.array([reason or None for reason in reasons], pa.string())
        return pa.table(scored)


def score_rows(
    rows: Path,
    scorers: Sequence["Scorer"],
    actors: ActorPool,
    *,
    batch_size: int,
    notes: BatchNotes,
    kept: Path,
    splits: Sequence[str] = SPLITS,
) -> pa.Table:
    """pair_id, the scorers' columns and a reason of an artifact's rows, in their order.

    A pair for which a scorer fails has NaN in its columns, and the reason why; null otherwise.

    Args:
        rows: folder of Parquet files with tokens.
        batch_size: rows per call of an actor, at most.
        kept: folder for what is scored, so that a pass that is killed resumes; for these rows only.
        splits: of the rows to score.

    Raises:
        UserError: a scorer's model is not one that can be scored with, or no pair can be scored.
        Stopped: a batch killed its actor again and again.
        RuntimeError: rows were lost.
    """
    ids, new_tokens = _ids_and_tokens(rows, splits)
    columns = [name for scorer in scorers for name in scorer.columns]
    known = ScoredChunks(kept, columns).find(ids)
    if known is not None:
        is_known = pc.is_in(ids, value_set=known[PAIR_ID]).to_numpy()
        if is_known.all():
            return in_order_of(known, ids)
        logger.info("%d of %d pairs are scored already", is_known.sum(), len(ids))
        new_tokens = np.where(is_known, 0, new_tokens)

    names = dict.fromkeys(name for scorer in scorers for name in scorer.reads)
    # partitioning: a folder named key=value is not a column.
    files = [str(file) for file in rows_files(rows)]
    dataset = ray.data.read_parquet(files, partitioning=None)
    if set(splits) != set(SPLITS):
        dataset = dataset.filter(expr=col(SPLIT).is_in(list(splits)))
    dataset = dataset.select_columns([PAIR_ID, *names])
    return _score(
        dataset,
        ids,
        scorers,
        actors,
        batch_size=batch_size,
        notes=notes,
        kept=kept,
        new_tokens=new_tokens,
    )


def _ids_and_tokens(rows: Path, splits: Sequence[str]) -> tuple[pa.ChunkedArray, np.ndarray]:
    """pair_id of some splits' rows, and how many tokens each of them has."""
    table = read_splits(rows, splits, [PAIR_ID, *LENGTHS.values()])
    return table[PAIR_ID], sum(table[name].to_numpy() for name in LENGTHS.values())


def score_table(
    table: pa.Table,
    scorers: Sequence["Scorer"],
    actors: ActorPool,
    *,
    batch_size: int,
    notes: BatchNotes,
) -> pa.Table:
    """A table of tokenised rows with the scorers' columns added.

    Raises as `score_rows` does, and UserError if a scorer fails for one of the rows.
    """
    dataset = ray.data.from_arrow(table)
    ids = table[PAIR_ID]
    scored = _score(dataset, ids, scorers, actors, batch_size=batch_size, notes=notes)
    failed = scored.filter(pc.is_valid(scored[REASON]))
    if failed.num_rows:
        raise UserError(
            f"{failed.num_rows} of {table.num_rows} rows could not be scored, such as "
            f"{failed[PAIR_ID][0]}: {failed[REASON][0]}"
        )
    for name in scored.column_names:
        if name not in (PAIR_ID, REASON):
            table = table.append_column(name, scored[name])
    return table


def _score(
    dataset: ray.data.Dataset,
    ids: pa.ChunkedArray,
    scorers: Sequence["Scorer"],
    actors: ActorPool,
    *,
    batch_size: int,
    notes: BatchNotes,
    kept: Path | None = None,
    new_tokens: np.ndarray | None = None,
) -> pa.Table:
    """Scores of the rows with these pair_ids, in their order.

    Args:
        new_tokens: of each pair, 0 if it is scored already; to report progress by.
    """
    rows_per_block = max(1, min(batch_size, math.ceil(len(ids) / MIN_BLOCKS)))
    scored = dataset.repartition(target_num_rows_per_block=rows_per_block).map_batches(
        ScoringActor,
        fn_constructor_kwargs={
            "scorers": scorers,
            "num_threads": actors.num_threads,
            "notes": notes,
            "kept": kept,
        },
        batch_size=rows_per_block,
        batch_format="pyarrow",
        **pool_options(actors),
    )
    with notes.reporting_deaths():
        tables = received(scored, "scores")
        if new_tokens is not None:
            tables = _reported(tables, new_tokens)
        table = pa.concat_tables(tables, promote_options="default")
    require_no_refusal(table)
    if len(table) != len(ids) or not pc.all(pc.equal(table[PAIR_ID], ids)).as_py():
        raise RuntimeError(f"{len(ids)} rows went into scoring, and others came out")
    return table


def _reported(tables: Iterator[pa.Table], new_tokens: np.ndarray) -> Iterator[pa.Table]:
    """The tables, while what they hold is counted."""
    progress = ScoringProgress(int(np.count_nonzero(new_tokens)))
    start = 0
    for table in tables:
        tokens = new_tokens[start : start + table.num_rows]
        start += table.num_rows
        if tokens.any():
            progress.add(int(np.count_nonzero(tokens)), int(tokens.sum()))
        yield table
