"""Micro-batches as rows of a table: read by number, sent to a rank, decoded there.

Imports no torch: the Ray Data actor that reads micro-batches starts faster without it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from madpo_ray.artifacts.tables import read_split_contiguous
from madpo_ray.columns import PAIR_ID
from madpo_ray.data.order import Order, StepPlace
from madpo_ray.data.token_files import TokenFiles

NUMBER = "number"
TOKENS = "tokens"  # of all pairs, one after the other
LENGTHS = "lengths"  # of the parts of each pair
PLACE = tuple(field.name for field in dataclasses.fields(StepPlace))


def open_tokens(order: Order) -> TokenFiles:
    """The tokens of an order's pairs. Makes the flat files if they are missing."""
    spec = order.spec
    return TokenFiles(spec.token_files, spec.rows, spec.split, spec.token_columns, order.lengths)


class MicroBatchReader:
    """Reads the micro-batches of an order."""

    def __init__(self, order: Order) -> None:
        spec = order.spec
        self._order = order
        self._tokens = open_tokens(order)
        self._columns = read_split_contiguous(spec.rows, spec.split, (PAIR_ID, *spec.columns))

    def read(self, numbers: Sequence[int]) -> pa.Table:
        """Micro-batches, one per row, for `decode_micro_batch`."""
        found = [self._order.members(number) for number in numbers]
        members = [rows for rows, _ in found]
        places = [place for _, place in found]
        fields: dict[str, pa.Array] = {NUMBER: pa.array(numbers, pa.int64())}
        for name in PLACE:
            fields[name] = pa.array([getattr(place, name) for place in places])

        parts = [[part for row in rows for part in self._tokens.read(row)] for rows in members]
        fields[TOKENS] = _lists([_joined(part) for part in parts])
        fields[LENGTHS] = _lists([np.array([len(one) for one in part], np.int32) for part in parts])

        own_columns = self._columns.take(np.concatenate(members))
        offsets = np.cumsum([0, *map(len, members)])
        for name in own_columns.column_names:
            values = own_columns[name].combine_chunks()
            fields[name] = pa.LargeListArray.from_arrays(offsets, values)
        return pa.table(fields)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.array([], np.int32)


def _lists(arrays: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)])
    return pa.LargeListArray.from_arrays(offsets, np.concatenate(arrays))


def decode_micro_batch(
    row: pa.Table, token_columns: Sequence[str]
) -> tuple[list[dict[str, Any]], StepPlace]:
    """The pairs of a table of one row, one dict per pair, and their place.

    Args:
        token_columns: `OrderSpec.token_columns` of its order.
    """
    names = [name for name in row.column_names if name not in (NUMBER, TOKENS, LENGTHS, *PLACE)]
    tokens = row[TOKENS][0].values.to_numpy()
    ends = np.cumsum(row[LENGTHS][0].values.to_numpy())
    parts = [part.tolist() for part in np.split(tokens, ends[:-1])] if len(ends) else []

    # The parts of a pair, and its own values.
    width = len(token_columns)
    pairs: list[dict[str, Any]] = [
        dict(zip(token_columns, parts[start : start + width], strict=True))
        for start in range(0, len(parts), width)
    ]
    for name in names:
        for pair, value in zip(pairs, row[name][0].values.to_pylist(), strict=True):
            pair[name] = value
    return pairs, StepPlace(**{name: row[name][0].as_py() for name in PLACE})
