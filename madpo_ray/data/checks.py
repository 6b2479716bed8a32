"""What the config's files must have before any row is tokenised, and what must be left after."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split
from madpo_ray.config import DataConfig, TrainingConfig
from madpo_ray.data.files import DAMAGED, Row
from madpo_ray.data.formats import UNREAD, Pair, parse_pair
from madpo_ray.data.messages import BadRowError, UnreadColumnError
from madpo_ray.data.order import count_tokens, require_budget
from madpo_ray.data.responses import SCORE_COLUMNS, pairs_in
from madpo_ray.data.sources import list_files, open_source
from madpo_ray.errors import UserError, did_you_mean

# Rows of a file that are read to find out what the prompt is.
NUM_FIRST_ROWS = 100
# What other data sets call the prompt.
LIKELY_PROMPTS = ("question", "instruction", "query", "input", "context", "problem", "user")


def check_files(data: DataConfig) -> None:
    """Raises UserError if a file is missing, of an unknown kind, or lacks a column."""
    needed = _needed_columns(data)
    for file in list_files(data.files):
        available = open_source(file).columns()
        if available is None:
            continue
        for name, key in needed.items():
            if name not in available:
                raise UserError(
                    f"{key}: {file} has no column {name!r}{did_you_mean(name, available)}"
                )
        _check_first_rows(file, available, data)


def _needed_columns(data: DataConfig) -> dict[str, str]:
    """The columns that every file must have, and the keys that name them."""
    keys = ["responses_column", "scores_column"]
    kept = list(data.kept_columns.values())
    if data.responses_column is None:
        keys = ["chosen_column", "rejected_column"]
    else:
        kept = [name for name in kept if name not in SCORE_COLUMNS]
    keys += ["split_column", "group_column", "system_column"]
    needed = {getattr(data, key): f"data.{key}" for key in keys if getattr(data, key) is not None}
    return needed | {name: "data.keep_columns" for name in kept if name not in needed}


def _check_first_rows(file: str, available: Sequence[str], data: DataConfig) -> None:
    """Raises UserError unless it is certain what the prompt is."""
    rows = (row for row in open_source(file).rows() if isinstance(row, dict))
    num_pairs = 0
    unread: UnreadColumnError | None = None
    for row in itertools.islice(rows, NUM_FIRST_ROWS):
        try:
            num_pairs += len(_parse_pairs(row, data))
        except UnreadColumnError as error:
            unread = unread or error
        except BadRowError:
            continue

    # A column that belongs to the prompt would be left out.
    likely = [name for name in LIKELY_PROMPTS if name in available]
    has_prompt = data.implicit_prompt or data.prompt_column in available
    if unread is not None and (has_prompt or num_pairs or not likely):
        raise UserError(f"data.files: {file}: {unread}")
    if num_pairs or has_prompt:
        return

    # There is no prompt.
    hint = f"; did you mean {likely[0]!r}?" if likely else ""
    hint = hint or did_you_mean(data.prompt_column, available)
    hint = hint if hint.endswith("?") else f"{hint}."
    raise UserError(
        f"data.files: {file} has no column {data.prompt_column!r}{hint} Set data.prompt_column; or "
        "data.implicit_prompt: true, if the common beginning of both responses is the prompt"
    )


def holds_messages(data: DataConfig) -> bool:
    """Whether the first good row holds messages."""
    for file in list_files(data.files):
        for row in open_source(file).rows():
            try:
                if isinstance(row, dict) and (found := _parse_pairs(row, data)):
                    return found[0].is_conversational
            except BadRowError:
                continue
    return False


def _parse_pairs(row: Row, data: DataConfig) -> list[Pair]:
    """The usable pairs of a row. Raises UnreadColumnError, or BadRowError for the complete row."""
    found = []
    for pair in pairs_in(row, data):
        try:
            if isinstance(pair, dict):
                found.append(parse_pair(pair, data))
        except UnreadColumnError:
            raise
        except BadRowError:
            continue
    return found


def check_budget(rows: Path, settings: TrainingConfig, responses: Sequence[str]) -> None:
    """Raises UserError if a pair of stage `pairs` is longer than a training's budget of tokens.

    Args:
        responses: columns of the token ids that it reads after the prompt's.
    """
    if settings.max_tokens_per_device is None:
        return
    names = [columns.LENGTHS[name] for name in (columns.PROMPT_IDS, *responses)]
    for split in (columns.TRAIN, columns.VALIDATION):
        table = read_split(rows, split, names)
        lengths = np.stack([table[name].to_numpy() for name in names], axis=1)
        require_budget(count_tokens(lengths, packed=True), settings.max_tokens_per_device)


def check_counts(results: Mapping[str, Any], data: DataConfig) -> None:
    """Raises UserError if too little is left of the rows.

    Args:
        results: `pairs` by split, and `rejects` and `left_out` by kind of reason; all are rows that
            were read. `first_rejects` are places, by kind.
    """
    counts = results["pairs"]
    rejects = Counter(results["rejects"])
    num_pairs = sum(counts.values())
    left_out = Counter(results.get("left_out", {}))
    all_reasons = (rejects + left_out).most_common(5)
    first = results.get("first_rejects", {})
    reasons = "; ".join(
        f"{count} x {reason}" + (f", first {first[reason]}" if reason in first else "")
        for reason, count in all_reasons
    )
    if not num_pairs:
        raise UserError(
            f"no usable pair in {', '.join(data.files)}: {reasons or 'the files are empty'}"
        )

    # Nobody knows how many rows are lost.
    if num_damaged := rejects[DAMAGED]:
        raise UserError(
            f"{num_damaged} of the files in {', '.join(data.files)} are damaged, end too early or "
            "could not be fetched: run the command again, repair them, or leave them out of "
            "data.files"
        )

    # The config leaves out what belongs to the prompt: not a matter of single rows.
    for kind, count in rejects.items():
        if UNREAD in kind:
            raise UserError(f"{count} rows of {', '.join(data.files)}: {kind}")

    # Some, but too few.
    num_rows = num_pairs + rejects.total() + left_out.total()
    if rejects.total() > data.max_reject_fraction * num_rows:
        raise UserError(
            f"{rejects.total()} of {num_rows} rows are rejected, more than "
            f"data.max_reject_fraction {data.max_reject_fraction:g} allows: {reasons}. Raise "
            "it to get them all in rejects.parquet"
        )

    # None in a split that training needs.
    for split in (columns.TRAIN, columns.VALIDATION):
        if not counts[split]:
            raise UserError(
                f"no pair is in split {split} (pairs: {counts}; rejects: {reasons or 'none'}). "
                "Pairs of one group stay in one split: if all have one prompt, set "
                "data.group_column or data.split_column; else raise data.validation_fraction or "
                "test_fraction"
            )
