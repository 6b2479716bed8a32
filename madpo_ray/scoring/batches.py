"""Which pairs a scorer reads together, and their tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from madpo_ray.columns import PROMPT_IDS
from madpo_ray.data.batching import MicroBatch, collate
from madpo_ray.prefetch import prefetched

Batch = tuple[list[int], MicroBatch]  # the numbers of its rows, and their tensors


class Batches:
    """The micro-batches of a table, made once for all models that read them alike.

    Only those of the last table are kept.
    """

    def __init__(self) -> None:
        self._rows: pa.Table | None = None
        self._made: dict[Any, list[Batch]] = {}

    def of(
        self,
        rows: pa.Table,
        responses: tuple[str, ...],
        batch_size: int,
        max_tokens: int | None,
        *,
        packed: bool,
    ) -> Iterator[Batch]:
        """The rows in groups as `cut` makes them; the next one is made while one is in use.

        Args:
            rows: a table with prompt and responses.
            packed: see `batching.collate`.
        """
        if rows is not self._rows:
            self._rows, self._made = rows, {}
        key = (responses, batch_size, max_tokens, packed)
        if key not in self._made:
            made = []
            for batch in prefetched(_make(rows, *key)):
                made.append(batch)
                yield batch
            self._made[key] = made
            return
        yield from self._made[key]


def _make(
    rows: pa.Table,
    responses: tuple[str, ...],
    batch_size: int,
    max_tokens: int | None,
    packed: bool,
) -> Iterator[Batch]:
    names = [PROMPT_IDS, *responses]
    pairs = rows.select(names).to_pylist()
    lengths = [_count_tokens(*(len(pair[name]) for name in names), packed=packed) for pair in pairs]
    for members in cut(lengths, batch_size, max_tokens, padded=not packed):
        batch = collate([pairs[i] for i in members], packed=packed, responses=responses)
        yield members, batch.pinned()


def _count_tokens(prompt: int, *responses: int, packed: bool) -> int:
    """Of a pair, in the rows that it is read as."""
    if packed:
        return prompt + sum(responses)
    return len(responses) * (prompt + max(responses))


def cut(
    lengths: Sequence[int], batch_size: int, max_tokens: int | None, *, padded: bool
) -> Iterator[list[int]]:
    """Which pairs are read together, longest first: one that does not fit in memory shows at once.

    Args:
        lengths: tokens of each pair.
        batch_size: pairs that are read together, unless there is a bound on their tokens.
        max_tokens: of pairs that are read together; a longer one is read alone.
        padded: whether each counts as the longest of those that are read with it.
    """
    group: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens = lengths[group[0]] if padded and group else lengths[i]
        is_full = len(group) == batch_size if max_tokens is None else total + tokens > max_tokens
        if group and is_full:
            yield group
            group, total, tokens = [], 0, lengths[i]
        group.append(i)
        total += tokens
    if group:
        yield group
