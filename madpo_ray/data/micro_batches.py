"""Micro-batches as rows of a table: read by number, sent to a rank, decoded there.

Imports no torch: the Ray Data actor that reads micro-batches starts faster without it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray.artifacts.tables import read_split_contiguous
from madpo_ray.columns import PAIR_ID
from madpo_ray.data.flat_files import TextFiles, TokenFiles
from madpo_ray.data.order import Order, StepPlace

NUMBER = "number"
TOKENS = "tokens"  # of all pairs, one after the other
TOKEN_COUNTS = "lengths"  # of the parts of each pair
STEP_FIELDS = tuple(field.name for field in dataclasses.fields(StepPlace))


def open_tokens(order: Order) -> TokenFiles:
    """The tokens of an order's pairs. Makes the flat files if they are missing."""
    spec = order.spec
    return TokenFiles(
        spec.token_files, spec.rows, spec.split, spec.token_columns, order.all_lengths
    )


def open_texts(order: Order) -> TextFiles:
    """The texts of an order's pairs that come with its micro-batches. Makes missing files."""
    spec = order.spec
    return TextFiles(spec.token_files, spec.rows, spec.split, spec.text_columns)


class MicroBatchReader:
    """Reads the micro-batches of an order.

    Args:
        complete: adds the columns that the stored rows lack, to the table of a split's pairs.
    """

    def __init__(
        self, order: Order, complete: Callable[[pa.Table], pa.Table] | None = None
    ) -> None:
        spec = order.spec
        self._order = order
        self._tokens = open_tokens(order)
        self._texts = open_texts(order)
        self._columns = read_split_contiguous(spec.rows, spec.split, (PAIR_ID, *spec.columns))
        if complete is not None:
            self._columns = complete(self._columns)

    def read(self, numbers: Sequence[int]) -> pa.Table:
        """Micro-batches, one per row, for `decode_micro_batch`."""
        found = [self._order.members(number) for number in numbers]
        members = [rows for rows, _ in found]
        places = [place for _, place in found]
        fields: dict[str, pa.Array] = {NUMBER: pa.array(numbers, pa.int64())}
        for name in STEP_FIELDS:
            fields[name] = pa.array([getattr(place, name) for place in places])

        parts = [[part for row in rows for part in self._tokens.read(row)] for rows in members]
        fields[TOKENS] = _lists([_joined(part) for part in parts])
        fields[TOKEN_COUNTS] = _lists(
            [np.array([len(one) for one in part], np.int32) for part in parts]
        )

        all_rows = np.concatenate(members)
        own = self._columns.take(all_rows)
        for name, texts in self._read_texts(all_rows).items():
            own = own.append_column(name, texts)
        offsets = np.cumsum([0, *map(len, members)])
        for name in own.column_names:
            values = own[name].combine_chunks()
            fields[name] = pa.LargeListArray.from_arrays(offsets, values)
        return pa.table(fields)

    def _read_texts(self, rows: np.ndarray) -> dict[str, pa.Array]:
        names = self._order.spec.text_columns
        if not names:
            return {}
        found = [self._texts.read(row) for row in rows]
        return {
            name: pa.array([texts[i] for texts in found], pa.string())
            for i, name in enumerate(names)
        }


def pairs_of(micro_batches: pa.Table, token_columns: Sequence[str]) -> pa.Table:
    """The pairs of a table of micro-batches, one per row, as an artifact has them.

    Args:
        token_columns: `OrderSpec.token_columns` of their order.
    """
    tokens = micro_batches[TOKENS].combine_chunks().flatten()
    lengths = micro_batches[TOKEN_COUNTS].combine_chunks().flatten().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    parts = pa.LargeListArray.from_arrays(offsets, tokens)
    width = len(token_columns)
    fields: dict[str, pa.Array] = {
        name: parts.take(pa.array(np.arange(i, len(parts), width)))
        for i, name in enumerate(token_columns)
    }
    for name in own_columns(micro_batches):
        fields[name] = micro_batches[name].combine_chunks().flatten()
    return pa.table(fields)


def with_columns(micro_batches: pa.Table, numbers: pa.Table) -> pa.Table:
    """Micro-batches with more columns of their pairs.

    Args:
        numbers: the columns, with one row per pair in the order of `pairs_of`.
    """
    sizes = pc.list_value_length(micro_batches[PAIR_ID]).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    for name in numbers.column_names:
        values = numbers[name].combine_chunks()
        lists = pa.LargeListArray.from_arrays(offsets, values)
        micro_batches = micro_batches.append_column(name, lists)
    return micro_batches


def own_columns(micro_batches: pa.Table) -> list[str]:
    """The columns that hold a value per pair."""
    others = (NUMBER, TOKENS, TOKEN_COUNTS, *STEP_FIELDS)
    return [name for name in micro_batches.column_names if name not in others]


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
    tokens = row[TOKENS][0].values.to_numpy()
    ends = np.cumsum(row[TOKEN_COUNTS][0].values.to_numpy())
    parts = [part.tolist() for part in np.split(tokens, ends[:-1])] if len(ends) else []

    # The parts of a pair, and its own values.
    width = len(token_columns)
    pairs: list[dict[str, Any]] = [
        dict(zip(token_columns, parts[start : start + width], strict=True))
        for start in range(0, len(parts), width)
    ]
    for name in own_columns(row):
        for pair, value in zip(pairs, row[name][0].values.to_pylist(), strict=True):
            pair[name] = value
    return pairs, StepPlace(**{name: row[name][0].as_py() for name in STEP_FIELDS})
