"""Rows of files become checked, tokenised pairs with group and split, or rejects with a reason."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from madpo_ray import columns
from madpo_ray.config import DataConfig
from madpo_ray.data.formats import BadRowError, parse_pair
from madpo_ray.data.sources import ROWS_PER_BATCH, Row, open_source
from madpo_ray.data.splits import content_hash, default_group, split_of
from madpo_ray.data.tokens import tokenize_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairReader:
    """Reads, checks and tokenises one file after another.

    A run reads one kind of pairs: texts, or messages (`is_conversational`).
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        seed: int,
        is_conversational: bool,
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._is_conversational = is_conversational
        self._schema = pairs_schema(data, is_conversational)

    def tables(self, file: str, file_number: int) -> Iterator[pa.Table]:
        """All rows of a file, in order; a reject has a `reason` and little else."""
        rows: list[Row] = []
        for row_number, row in enumerate(open_source(file).rows()):
            place = {
                columns.FILE: file,
                columns.FILE_NUMBER: file_number,
                columns.ROW: row_number,
            }
            rows.append(place | self.read(row))
            if len(rows) == ROWS_PER_BATCH:
                yield pa.Table.from_pylist(rows, schema=self._schema)
                rows = []
        yield pa.Table.from_pylist(rows, schema=self._schema)

    def read(self, row: Row | str) -> Row:
        """The row's pair, tokens, group and split, or the reason why it has none.

        Args:
            row: a row of a source, or the source's reason why it cannot be read.
        """
        try:
            if isinstance(row, str):
                raise BadRowError(row)
            return self._checked(row)
        except BadRowError as error:
            return {columns.REASON: str(error)}

    def _checked(self, row: Row) -> Row:
        data = self._data
        pair = parse_pair(row)
        if isinstance(pair[columns.PROMPT], list) != self._is_conversational:
            raise BadRowError("text among messages, or messages among text: a run reads one kind")
        tokens = tokenize_pair(pair, self._tokenizer, data.max_length)

        group = default_group(pair)
        if data.group_column is not None:
            group = _required(row, data.group_column)
        split = split_of(group, data, self._seed)
        if data.split_column is not None:
            split = _required(row, data.split_column)
        if split not in columns.SPLITS:
            known = ", ".join(columns.SPLITS)
            raise BadRowError(f"{data.split_column} is {split!r}, not one of {known}")

        return {
            **pair,
            **tokens,
            **{name: _number(row, name) for name in data.keep_columns},
            columns.CONTENT_HASH: content_hash(pair),
            columns.GROUP: group,
            columns.SPLIT: split,
        }


def _required(row: Row, name: str) -> str:
    if row.get(name) is None:
        raise BadRowError(f"{name} is missing")
    return str(row[name])


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"{name} is not a number")
    return float(value)


def pairs_schema(data: DataConfig, is_conversational: bool) -> pa.Schema:
    """Columns of the reader's tables."""
    text = pa.string()
    if is_conversational:
        text = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    fields = [
        (columns.FILE, pa.string()),
        (columns.FILE_NUMBER, pa.int64()),
        (columns.ROW, pa.int64()),
        (columns.REASON, pa.string()),
    ]
    fields += [(name, text) for name in columns.TEXT_COLUMNS]
    fields += [(name, pa.list_(pa.int32())) for name in columns.TOKEN_COLUMNS]
    fields += [
        (columns.CONTENT_HASH, pa.string()),
        (columns.GROUP, pa.string()),
        (columns.SPLIT, pa.string()),
    ]
    fields += [(name, pa.float64()) for name in data.keep_columns]
    return pa.schema(fields)
