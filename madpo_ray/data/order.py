"""The order of pairs: which pair is in which micro-batch of which step, for any number of workers.

The order follows from (seed, epoch, lengths) only. Micro-batches are numbered over all steps of a
run; each step is filled up with empty ones to a multiple of the workers, and rank r of W reads
numbers r, r + W, r + 2W, ... A micro-batch is sent as a table of one row, encoded and decoded here.

Imports no torch: the Ray Data actor that builds micro-batches starts faster without it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray.artifacts.tables import read_split, read_split_contiguous
from madpo_ray.columns import PAIR_ID, PROMPT_IDS, RESPONSE_IDS
from madpo_ray.errors import UserError

# Steps whose pairs are sorted by length together: enough for little padding, few enough to keep
# the steps of an epoch mixed.
STEPS_PER_WINDOW = 16


@dataclass(frozen=True)
class OrderSpec:
    """What decides the order, and where the rows are."""

    rows: Path  # folder of Parquet files with tokens and `columns`
    split: str
    columns: tuple[str, ...]
    seed: int
    global_batch_size: int | None  # pairs per step; None: all of them
    micro_batch_size: int  # pairs per forward, if there is no budget
    num_workers: int
    max_tokens: int | None = None  # per forward, padding included
    shared_prefix: bool = True  # whether a pair's prompt is read once or once per response
    responses: tuple[str, ...] = RESPONSE_IDS
    num_epochs: int = 1
    max_steps: int = -1
    is_shuffled: bool = True


@dataclass(frozen=True)
class StepPlace:
    """What a micro-batch needs to know of its optimizer step."""

    step: int = 0
    pairs_in_step: int = 1  # over all ranks and micro-batches
    response_tokens_in_step: int = 1  # over all ranks and micro-batches
    is_last: bool = True  # this rank's last micro-batch of the step


def count_steps(steps_per_epoch: int, num_epochs: int, max_steps: int) -> int:
    """Optimizer steps of a training; `max_steps` decides if it is positive."""
    return max_steps if max_steps > 0 else num_epochs * steps_per_epoch


def order_epoch(
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    tokens_read: np.ndarray | None = None,
    max_tokens: int | None = None,
) -> list[list[np.ndarray]]:
    """Micro-batches of row numbers, per optimizer step.

    A function of its arguments only, never of the number of workers. The pairs are shuffled by
    (seed, epoch), sorted by length within windows of a few steps and cut into steps; a window's
    full steps are shuffled again. With `epoch` None the windows keep the order of the rows. The
    last step may be short; every pair is in the epoch exactly once.

    A step is cut into micro-batches of `micro_batch_size` pairs, or of at most `max_tokens` tokens
    when padded to the longest.

    Args:
        lengths: tokens of each pair, (pairs,).
        tokens_read: tokens that the model reads for each pair, (pairs,), if they are others.
    """
    rng = None if epoch is None else np.random.default_rng([seed, epoch])
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    window = global_batch_size * (1 if rng is None else STEPS_PER_WINDOW)

    # Cut windows of similar lengths into steps.
    steps: list[np.ndarray] = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        members = members[np.argsort(-lengths[members], kind="stable")]
        in_window = _chunks(members, global_batch_size)
        if rng is not None:
            num_full = len(members) // global_batch_size
            in_window[:num_full] = [in_window[i] for i in rng.permutation(num_full)]
        steps += in_window

    # Cut steps into micro-batches.
    if max_tokens is None:
        return [_chunks(step, micro_batch_size) for step in steps]
    tokens = lengths if tokens_read is None else tokens_read
    return [_within_budget(step, tokens, max_tokens) for step in steps]


def _chunks(members: np.ndarray, size: int) -> list[np.ndarray]:
    return [members[i : i + size] for i in range(0, len(members), size)]


def _within_budget(members: np.ndarray, tokens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cuts a step so that no micro-batch is padded to more tokens than the budget."""
    cut = []
    start = 0
    longest = 0
    for end, count in enumerate(tokens[members].tolist()):
        if end > start and max(longest, count) * (end - start + 1) > max_tokens:
            cut.append(members[start:end])
            start = end
            longest = 0
        longest = max(longest, count)
    return [*cut, members[start:]]


class Order:
    """The micro-batches of a complete run.

    Reads the tokens of the split once for their lengths, and again when the first micro-batch is
    asked for.

    Attributes:
        tokens_read: tokens that the model reads for each pair of the split, (pairs,).
        steps_per_epoch, total_steps: optimizer steps.
        max_response_tokens: the largest number of response tokens in a micro-batch.
        first_micro_batches: number of each step's first one, and the end, (total_steps + 1,).

    Raises:
        UserError: the split has no pairs, or one that is longer than the budget.
    """

    def __init__(self, spec: OrderSpec) -> None:
        self._spec = spec
        self._read_lengths()
        self._check_budget()

        # Steps of the run.
        num_pairs = len(self._lengths)
        self._global_batch_size = spec.global_batch_size or num_pairs
        self.steps_per_epoch = math.ceil(num_pairs / self._global_batch_size)
        self.total_steps = count_steps(self.steps_per_epoch, spec.num_epochs, spec.max_steps)

        # Micro-batches of each step, filled up to a multiple of the workers.
        self._epoch_number = -1
        self._epoch_steps: list[list[np.ndarray]] = []
        self.max_response_tokens = 0
        counts = []
        for epoch in range(math.ceil(self.total_steps / self.steps_per_epoch)):
            for step in self._steps_of(epoch):
                counts.append(math.ceil(len(step) / spec.num_workers) * spec.num_workers)
                largest = max(int(self._response_tokens[rows].sum()) for rows in step)
                self.max_response_tokens = max(self.max_response_tokens, largest)
        self.first_micro_batches = np.concatenate([[0], np.cumsum(counts[: self.total_steps])])

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of all steps, with the empty ones that fill a step up."""
        return int(self.first_micro_batches[-1])

    def first_micro_batch(self, step: int) -> int:
        """The number of a step's first micro-batch; the end for the step after the last."""
        return int(self.first_micro_batches[step])

    def micro_batch(self, number: int) -> pa.Table:
        """Micro-batch `number` of the run, as a table of one row for `decode_micro_batch`."""
        step = int(np.searchsorted(self.first_micro_batches, number, side="right")) - 1
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        micro_batches = self._steps_of(epoch)[step_in_epoch]

        index = number - self.first_micro_batch(step)
        is_filler = index >= len(micro_batches)
        members = np.array([], dtype=np.int64) if is_filler else micro_batches[index]

        in_step = np.concatenate(micro_batches)
        place = StepPlace(
            step=step,
            pairs_in_step=len(in_step),
            response_tokens_in_step=int(self._response_tokens[in_step].sum()),
            is_last=number >= self.first_micro_batch(step + 1) - self._spec.num_workers,
        )
        return _encode_micro_batch(self._table.take(members), place)

    def _read_lengths(self) -> None:
        spec = self._spec
        tokens = read_split(spec.rows, spec.split, self._token_columns)
        if tokens.num_rows == 0:
            raise UserError(
                f"no pair of {spec.rows.parent} is in split {spec.split!r}: see data.split_column "
                "and the fractions"
            )
        prompt, *responses = (
            pc.list_value_length(tokens[name]).to_numpy() for name in self._token_columns
        )
        self._response_tokens = np.sum(responses, axis=0)
        self._lengths = prompt + self._response_tokens
        self.tokens_read = self._lengths
        if not spec.shared_prefix:  # a row for each response, padded to the longer one
            self.tokens_read = len(responses) * (prompt + np.max(responses, axis=0))

    def _check_budget(self) -> None:
        longest = int(self.tokens_read.max())
        budget = self._spec.max_tokens
        if budget is not None and longest > budget:
            raise UserError(
                f"max_tokens_per_device: {budget} is less than the longest pair's {longest} "
                "tokens: raise it, or lower data.max_length"
            )

    def _steps_of(self, epoch: int) -> list[list[np.ndarray]]:
        if self._epoch_number != epoch:
            self._epoch_number = epoch
            self._epoch_steps = order_epoch(
                self._lengths,
                seed=self._spec.seed,
                epoch=epoch if self._spec.is_shuffled else None,
                global_batch_size=self._global_batch_size,
                micro_batch_size=self._spec.micro_batch_size,
                tokens_read=self.tokens_read,
                max_tokens=self._spec.max_tokens,
            )
        return self._epoch_steps

    @property
    def _token_columns(self) -> tuple[str, ...]:
        return (PROMPT_IDS, *self._spec.responses)

    @functools.cached_property
    def _table(self) -> pa.Table:
        names = (PAIR_ID, *self._token_columns, *self._spec.columns)
        return read_split_contiguous(self._spec.rows, self._spec.split, names)


def _encode_micro_batch(pairs: pa.Table, place: StepPlace) -> pa.Table:
    """One row: the fields of `place`, and each column of `pairs` as one list."""
    row = {name: pa.array([value]) for name, value in dataclasses.asdict(place).items()}
    offsets = pa.array([0, pairs.num_rows], type=pa.int64())
    for name in pairs.column_names:
        row[name] = pa.LargeListArray.from_arrays(offsets, pairs[name].combine_chunks())
    return pa.table(row)


def decode_micro_batch(row: pa.Table) -> tuple[list[dict[str, Any]], StepPlace]:
    """The pairs of a row of `Order.micro_batch`, one dict per pair, and their place."""
    values = {name: row[name][0].as_py() for name in row.column_names}
    place_names = [field.name for field in dataclasses.fields(StepPlace)]
    place = StepPlace(**{name: values.pop(name) for name in place_names})

    def pair(cells: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(values, cells, strict=True))

    return [pair(cells) for cells in zip(*values.values(), strict=True)], place
