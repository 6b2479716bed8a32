"""Numbers of pairs that are scored while the policy is trained on them."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray import columns
from madpo_ray.artifacts.tables import column_names, read_columns
from madpo_ray.columns import PAIR_ID
from madpo_ray.config import ActorPool
from madpo_ray.scoring.chunks import ScoredChunks, in_order_of
from madpo_ray.scoring.reasons import check_reasons
from madpo_ray.scoring.scaling import Scaling

if TYPE_CHECKING:
    from madpo_ray.scoring.scorers import Scorer

# How long a network file system may show an old listing, in seconds.
LISTING_S = 60


@dataclass(frozen=True)
class StreamedScores:
    """Where the numbers of a run's pairs are found, or made; pickled to actors and workers.

    Attributes:
        kept: folder of `ScoredChunks` for what the scorers give.
        actors: those that score.
        batch_size: pairs that they score at a time.
        scorers: what is still to be scored.
        finished: folders of rows with the columns of scorers that are done.
        source_columns: columns of the data that hold rewards, or the margin.
        scaling: what makes margins calibrated; None if there are no rewards.
        max_reject_fraction: the share of pairs that may fail.
    """

    kept: Path
    actors: ActorPool
    batch_size: int
    scorers: tuple["Scorer", ...]
    finished: tuple[Path, ...] = ()
    source_columns: tuple[str, ...] = ()
    scaling: Scaling | None = None
    max_reject_fraction: float = 1.0  # no limit

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that training may read and the pairs' own rows lack."""
        margins = () if self.scaling is None else (columns.MARGIN,)
        return (*columns.REF_LOGPS, *margins)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The texts that the scorers read."""
        read = {name for scorer in self.scorers for name in scorer.reads}
        return tuple(name for name in columns.TEXT_COLUMNS if name in read)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The numbers of the pairs' own rows that are needed besides tokens and texts."""
        read = [name for scorer in self.scorers for name in scorer.reads]
        others = (*columns.TOKEN_COLUMNS, *columns.TEXT_COLUMNS)
        return (*self.source_columns, *(name for name in read if name not in others))

    def numbers(self, own: pa.Table, scored: pa.Table) -> pa.Table:
        """`columns` of some pairs; NaN for those that could not be scored.

        Args:
            own: their pair_id and `source_columns`.
            scored: their pair_id and the scorers' columns, in the same order.
        """
        numbers = self._with_known(own, scored)
        if self.scaling is not None:
            numbers = with_margins(numbers, self.scaling)
        return numbers.select(list(self.columns))

    @functools.cached_property
    def _finished_tables(self) -> list[pa.Table]:
        return [read_columns(rows, column_names(rows)) for rows in self.finished]

    def complete(self, own: pa.Table) -> pa.Table:
        """A table of pairs with `columns`, read from the disk. Raises as `stored` does."""
        numbers = self.numbers(own, self._scored(own))
        for name in numbers.column_names:
            own = own.append_column(name, numbers[name])
        return own.combine_chunks()

    def stored(self, own: pa.Table) -> pa.Table:
        """Rewards, in their own units, and log-probs of some pairs, read from the disk.

        Raises:
            RuntimeError: some of the pairs have not been scored.
        """
        return self._with_known(own, self._scored(own))

    def _scored(self, own: pa.Table) -> pa.Table:
        """What the scorers gave."""
        if not self.scorers:
            return own.select([PAIR_ID])
        began = time.monotonic()
        while (known := self.find(own[PAIR_ID])).num_rows < own.num_rows:
            # Another node may have written them a moment ago.
            if time.monotonic() - began > LISTING_S:
                break
            time.sleep(1)
        return in_order_of(known, own[PAIR_ID])

    def find(self, ids: pa.ChunkedArray) -> pa.Table:
        """What the scorers gave, also if they failed, and has been kept; in any order."""
        names = [name for scorer in self.scorers for name in scorer.columns]
        known = ScoredChunks(self.kept, names).find(ids, with_failed=True)
        if known is None:
            texts = pa.chunked_array([], pa.string())
            return pa.table({PAIR_ID: texts, columns.REASON: texts})
        return known

    def count_failures(self, ids: pa.ChunkedArray) -> int:
        """How many of those pairs that have been tried could not be scored.

        Raises:
            UserError: more than `max_reject_fraction` of them.
        """
        # The reason of the first scorer that failed for a pair; those that were tried by all.
        reasons = pa.nulls(len(ids), pa.string())
        tables = [self.find(ids), *self._finished_tables] if self.scorers else self._finished_tables
        for table in tables:
            places = pc.index_in(ids, value_set=table[PAIR_ID].combine_chunks())
            reasons = pc.coalesce(reasons, table[columns.REASON].combine_chunks().take(places))
            is_tried = pc.is_valid(places)
            ids, reasons = ids.filter(is_tried), reasons.filter(is_tried)
        return check_reasons(reasons, self.max_reject_fraction).total()

    def _with_known(self, own: pa.Table, scored: pa.Table) -> pa.Table:
        """The scorers' columns with what needs no scoring."""
        for table in self._finished_tables:
            table = table.filter(pc.is_in(table[PAIR_ID], value_set=own[PAIR_ID]))
            found = in_order_of(table, own[PAIR_ID])
            for name in found.drop_columns([PAIR_ID, columns.REASON]).column_names:
                scored = scored.append_column(name, found[name])
        return with_source(scored, own, self.source_columns)


def with_source(scores: pa.Table, own: pa.Table, names: Sequence[str]) -> pa.Table:
    """Adds what the data brings: both rewards, or the margin, or nothing.

    Args:
        own: the pairs of `scores`, in the same order, with the columns `names`.
    """
    if not names:
        return scores
    targets = columns.REWARDS if len(names) > 1 else (columns.MARGIN,)
    for name, target in zip(names, targets, strict=True):
        scores = scores.append_column(target, own[name])
    return scores


def with_margins(scores: pa.Table, scaling: Scaling) -> pa.Table:
    """Margins raw and calibrated, and rewards divided by the temperature, if there is one."""
    margins = raw = margins_of(scores)
    is_given = columns.MARGIN in scores.column_names
    if is_given:
        scores = scores.drop_columns([columns.MARGIN])
    for name in columns.REWARDS:
        if name in scores.column_names:
            index = scores.column_names.index(name)
            scores = scores.set_column(index, name, pc.divide(scores[name], scaling.temperature))
    if is_given or scaling.knots:
        margins = pa.array(scaling(margins.to_numpy()))
    else:
        margins = margins_of(scores)  # the difference of these rewards, to the last bit
    return scores.append_column(columns.RAW_MARGIN, raw).append_column(columns.MARGIN, margins)


def margins_of(scores: pa.Table) -> pa.ChunkedArray:
    """The margin that the data brings, or the difference of rewards."""
    if columns.MARGIN in scores.column_names:
        return scores[columns.MARGIN]
    chosen, rejected = (scores[name] for name in columns.REWARDS)
    return pc.subtract(chosen, rejected)
