"""Which pairs a scorer reads together, and their tensors."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from madpo_ray.columns import PROMPT_IDS
from madpo_ray.config import ForwardOptions
from madpo_ray.data.batching import MicroBatch, collate
from madpo_ray.data.order import count_tokens, order_epoch
from madpo_ray.prefetch import prefetched

Batch = tuple[list[int], MicroBatch]  # the numbers of its rows, and their tensors


class Layout(NamedTuple):
    """What a model reads together, and in which rows."""

    responses: tuple[str, ...]  # columns with their token ids
    micro_batch_size: int  # see `cut_into_batches`
    max_tokens: int | None  # see `cut_into_batches`
    packed: bool  # see `batching.collate`

    @classmethod
    def of(cls, responses: tuple[str, ...], forward: ForwardOptions, *, packed: bool) -> "Layout":
        return cls(responses, forward.micro_batch_size, forward.max_tokens, packed)


class Batches:
    """The micro-batches of a table, made once for all models that read them alike.

    Only those of the last table are kept.
    """

    def __init__(self) -> None:
        self._rows: pa.Table | None = None
        self._made: dict[Layout, list[Batch]] = {}

    def micro_batches(self, rows: pa.Table, layout: Layout) -> Iterator[Batch]:
        """The rows of a table in groups; the next one is made while one is in use."""
        if rows is not self._rows:
            self._rows, self._made = rows, {}
        if layout in self._made:
            yield from self._made[layout]
            return
        made = []
        for batch in prefetched(make_batches(rows, layout)):
            made.append(batch)
            yield batch
        self._made[layout] = made


def make_batches(rows: pa.Table, layout: Layout) -> Iterator[Batch]:
    """The micro-batches of a table."""
    responses = layout.responses
    names = [PROMPT_IDS, *responses]
    pairs = rows.select(names).to_pylist()
    lengths = np.array([[len(pair[name]) for name in names] for pair in pairs]).reshape(
        -1, len(names)
    )
    tokens = count_tokens(lengths, packed=layout.packed)
    for members in cut_into_batches(
        tokens, layout.micro_batch_size, layout.max_tokens, padded=not layout.packed
    ):
        batch = collate([pairs[i] for i in members], packed=layout.packed, responses=responses)
        yield members, batch.pinned()


def cut_into_batches(
    lengths: np.ndarray, micro_batch_size: int, max_tokens: int | None, *, padded: bool
) -> Iterator[list[int]]:
    """Which rows are read together, longest first: one that does not fit in memory shows at once.

    Args:
        lengths: tokens of each row, (rows,).
        micro_batch_size: rows that are read together, unless there is a bound on their tokens.
        max_tokens: of rows that are read together; a longer one is read alone.
        padded: whether each counts as the longest of those that are read with it.
    """
    if not len(lengths):
        return
    in_one_step = order_epoch(
        lengths,
        seed=0,
        epoch=None,
        global_batch_size=len(lengths),
        micro_batch_size=micro_batch_size,
        max_tokens=max_tokens,
        padded=padded,
    )
    for start, end in itertools.pairwise(in_one_step.micro_batches):
        yield in_one_step.members[start:end].tolist()
