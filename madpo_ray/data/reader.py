"""Rows of files become checked, tokenised pairs with group and split, or rejects with a reason."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pyarrow as pa

from madpo_ray import columns
from madpo_ray.config import DataConfig
from madpo_ray.data.files import BLANK, ROWS_PER_BATCH, WHOLE, Piece, Row
from madpo_ray.data.formats import Pair, parse_pair
from madpo_ray.data.messages import BadRowError, as_text
from madpo_ray.data.responses import pairs_in
from madpo_ray.data.sources import open_source
from madpo_ray.data.splits import content_hash, default_group, group_hash, split_of, swapped_hash
from madpo_ray.data.tokens import Ids, JointTexts, joint_texts, split_tokens, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")

# A number in a file whose values are all text.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class PairReader:
    """Reads, checks and tokenises one piece of a file after another."""

    def __init__(
        self, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, seed: int
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._schema = pairs_schema(data)

    def tables(self, file: str, file_number: int, piece: Piece = WHOLE) -> Iterator[pa.Table]:
        """All rows of a piece, in order; a reject has a `reason` and little else."""
        pairs: list[Row | str] = []
        places: list[Row] = []
        source = open_source(file)
        for row_number, row in enumerate(source.rows(piece), piece.first_row):
            if row == BLANK:
                continue
            place = {
                columns.FILE: file,
                columns.FILE_NUMBER: file_number,
                columns.ROW: row_number,
            }
            for number, pair in enumerate(self._pairs_in(row)):
                pairs.append(pair)
                places.append(place | {columns.PAIR: number})
            if len(pairs) >= ROWS_PER_BATCH:
                yield self._table(pairs, places, has_types=source.has_types)
                pairs, places = [], []
        yield self._table(pairs, places, has_types=source.has_types)

    def _table(
        self, pairs: Sequence[Row | str], places: Sequence[Row], *, has_types: bool
    ) -> pa.Table:
        read = self.read(pairs, has_types=has_types)
        rows = [place | one for place, one in zip(places, read, strict=True)]
        return pa.Table.from_pylist(rows, schema=self._schema)

    def _pairs_in(self, row: Row | str) -> list[Row | str]:
        """The row's pairs, or a reason why it has none."""
        if isinstance(row, str):
            return [row]
        try:
            return list(pairs_in(row, self._data, self._seed))
        except BadRowError as error:
            return [str(error)]
        except Exception as error:  # whatever a row's values make a conversion raise
            return [f"the row cannot be read ({type(error).__name__}): {error}"]

    def read(self, rows: Sequence[Row | str], *, has_types: bool = True) -> list[Row]:
        """Each row's pair, tokens, group and split, or the reason why it has none.

        Args:
            rows: of a source, or the source's reasons why they cannot be read.
            has_types: whether numbers are numbers; else they are text.
        """
        parsed = [_or_reason(self._parsed, row) for row in rows]
        texts = [one.texts for one in parsed if isinstance(one, _Parsed)]
        tokenized = iter(tokenize(texts, self._tokenizer))
        read = []
        for one in parsed:
            if isinstance(one, _Parsed):
                one = _or_reason(self._checked, one, next(tokenized), has_types)
            read.append(one)
        return read

    def _parsed(self, row: Row | str) -> "_Parsed":
        if isinstance(row, str):
            kind, _, detail = row.partition(": ")
            raise BadRowError(kind, detail)
        pair = parse_pair(row, self._data)
        return _Parsed(row, pair, joint_texts(pair, self._tokenizer))

    def _checked(
        self, parsed: "_Parsed", ids: tuple[Ids, Ids, Ids] | Exception, has_types: bool
    ) -> Row:
        if isinstance(ids, Exception):
            raise ids
        data = self._data
        row, pair, _ = parsed
        may_truncate = data.over_length == "truncate"
        tokens = split_tokens(*ids, data.max_length, may_truncate=may_truncate)

        # Group and split come from the data, or from the prompt.
        group = default_group(pair)
        if data.group_column is not None:
            group = _text(row, data.group_column)
        split = split_of(group, data, self._seed)
        if data.split_column is not None:
            split = _text(row, data.split_column)
        if split not in columns.SPLITS:
            known = ", ".join(columns.SPLITS)
            raise BadRowError(f"{data.split_column} is not one of {known}", repr(split))

        return {
            columns.PROMPT: as_text(pair.prompt),
            columns.CHOSEN: as_text(pair.chosen),
            columns.REJECTED: as_text(pair.rejected),
            **tokens.as_columns(),
            **{name: _number(row, column, has_types) for name, column in data.kept_columns.items()},
            columns.CONTENT_HASH: content_hash(pair),
            columns.SWAPPED_HASH: swapped_hash(pair),
            columns.GROUP: group,
            columns.GROUP_HASH: group_hash(group),
            columns.SPLIT: split,
            columns.NUM_CUT: tokens.num_cut,
            columns.PROMPT_REPEATS: pair.prompt_repeats,
        }


class _Parsed(NamedTuple):
    """A row before its texts are tokenised."""

    row: Row
    pair: Pair
    texts: JointTexts


def _or_reason(make: Callable[..., T], *arguments: Any) -> T | Row:
    """What `make` gives, or the reason why it gives nothing."""
    try:
        return make(*arguments)
    except BadRowError as error:
        return _reject(error.kind, str(error))
    # Whatever a row's values make the tokenizer, a template or a conversion raise is about the
    # row, and it is recorded.
    except Exception as error:
        kind = f"the row cannot be read ({type(error).__name__})"
        return _reject(kind, f"{kind}: {error}")


def _reject(kind: str, reason: str) -> Row:
    # A reason may quote what is wrong with the row.
    def printable(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")

    return {columns.REASON_KIND: printable(kind), columns.REASON: printable(reason)}


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if isinstance(value, float):
        if math.isfinite(value) and value.is_integer():
            value = int(value)  # integers next to nulls are stored as floats
        elif not math.isfinite(value):
            value = None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str | int | float):
        raise BadRowError(f"{name} is neither text nor a number", type(value).__name__)
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{name} is not valid Unicode (half a surrogate pair)") from None
    return text


def _number(row: Row, name: str, has_types: bool) -> float:
    value = row.get(name)
    if not has_types and isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"{name} is not a number", type(value).__name__)
    try:
        number = float(value)
    except OverflowError:
        raise BadRowError(f"{name} is not a finite number") from None
    if not math.isfinite(number):
        raise BadRowError(f"{name} is not a finite number")
    return number


def pairs_schema(data: DataConfig) -> pa.Schema:
    """Columns of the reader's tables."""
    # Where a row comes from, and what happened to it.
    fields = [
        (columns.FILE, pa.string()),
        (columns.FILE_NUMBER, pa.int64()),
        (columns.ROW, pa.int64()),
        (columns.PAIR, pa.int32()),
        (columns.REASON_KIND, pa.string()),
        (columns.REASON, pa.string()),
        (columns.NUM_CUT, pa.int8()),
        (columns.PROMPT_REPEATS, pa.int8()),
    ]

    # What the pair is.
    fields += [(name, pa.string()) for name in columns.TEXT_COLUMNS]
    fields += [(name, pa.list_(pa.int32())) for name in columns.TOKEN_COLUMNS]
    fields += [(name, pa.int32()) for name in columns.LENGTHS.values()]
    fields += [
        (columns.CONTENT_HASH, pa.string()),
        (columns.SWAPPED_HASH, pa.string()),
        (columns.GROUP, pa.string()),
        (columns.GROUP_HASH, pa.int64()),
        (columns.SPLIT, pa.string()),
    ]
    fields += [(name, pa.float64()) for name in data.kept_columns]
    return pa.schema(fields)
