"""The order of pairs: which pair is in which micro-batch of which step, for any number of workers.

The order follows from (seed, epoch, lengths) only. Micro-batches are numbered over all steps of a
run; each step is filled up with empty ones to a multiple of the workers, and rank r of W reads
numbers r, r + W, r + 2W, ...

Imports no torch: the Ray Data actor that reads micro-batches starts faster without it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from madpo_ray.artifacts.tables import read_split
from madpo_ray.columns import GROUP_HASH, LENGTHS, PROMPT_IDS, RESPONSE_IDS
from madpo_ray.data.splits import folds_of, require_full_folds
from madpo_ray.errors import UserError

# Steps whose pairs are sorted by length together: ranks get equal work, an epoch is still shuffled.
STEPS_PER_WINDOW = 16


@dataclass(frozen=True)
class OrderSpec:
    """What decides the order, and where the rows are."""

    rows: Path  # folder of Parquet files with tokens, their lengths and `columns`
    token_files: Path  # folder for the split's tokens as flat files
    split: str
    columns: tuple[str, ...]
    seed: int
    global_batch_size: int | None  # pairs per step; None: all of them
    micro_batch_size: int  # pairs per forward, if there is no budget
    num_workers: int
    max_tokens: int | None = None  # per forward
    packed: bool = True  # one row for all pairs, else one per response, padded to the longest
    responses: tuple[str, ...] = RESPONSE_IDS
    text_columns: tuple[str, ...] = ()  # that come with a micro-batch
    fold: tuple[int, int] | None = None  # (k, K): without the pairs of fold k of K
    num_epochs: int = 1
    max_steps: int = -1
    is_shuffled: bool = True

    @property
    def token_columns(self) -> tuple[str, ...]:
        return (PROMPT_IDS, *self.responses)


@dataclass(frozen=True)
class StepPlace:
    """What a micro-batch needs to know of its optimizer step."""

    step: int = 0
    pairs_in_step: int = 1  # over all ranks and micro-batches
    response_tokens_in_step: int = 1  # over all ranks and micro-batches
    is_last: bool = True  # this rank's last micro-batch of the step


class Epoch(NamedTuple):
    """An epoch's pairs in order, cut into micro-batches, and these into steps."""

    members: np.ndarray  # (pairs,) row numbers
    micro_batches: np.ndarray  # (M + 1,) where each micro-batch begins in `members`, and the end
    steps: np.ndarray  # (S + 1,) where each step begins in `micro_batches`, and the end


def count_steps(steps_per_epoch: int, num_epochs: int, max_steps: int) -> int:
    """Optimizer steps of a training; `max_steps` decides unless it is -1."""
    return num_epochs * steps_per_epoch if max_steps == -1 else max_steps


def order_epoch(
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    tokens_read: np.ndarray | None = None,
    max_tokens: int | None = None,
    padded: bool = False,
) -> Epoch:
    """Orders the pairs of an epoch.

    A function of its arguments only, never of the number of workers. The pairs are shuffled by
    (seed, epoch), sorted by length within windows of a few steps and cut into steps; a window's
    full steps are shuffled again. With `epoch` None the windows keep the order of the rows. The
    last step may be short; every pair is in the epoch exactly once.

    A step is cut into micro-batches of `micro_batch_size` pairs, or of at most `max_tokens` tokens.

    Args:
        lengths: tokens of each pair, (pairs,).
        tokens_read: tokens that the model reads for each pair, (pairs,), if they differ.
        padded: whether a pair counts as the longest of its micro-batch.
    """
    members = _ordered_members(lengths, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
    starts = np.arange(0, len(members), global_batch_size)  # of the steps
    if max_tokens is None:
        offsets = np.arange(0, global_batch_size, micro_batch_size)
        micro_batches = (starts[:, None] + offsets).ravel()
        micro_batches = micro_batches[micro_batches < len(members)]  # the last step may be short
    else:
        tokens = lengths if tokens_read is None else tokens_read
        micro_batches = _cut_by_budget(tokens[members], global_batch_size, max_tokens, padded)
    steps = np.searchsorted(micro_batches, starts)
    return Epoch(
        members,
        np.append(micro_batches, len(members)),
        np.append(steps, len(micro_batches)),
    )


def count_tokens(lengths: np.ndarray, *, packed: bool) -> np.ndarray:
    """Tokens that a model reads for each pair, (pairs,), of `lengths` (pairs, 1 + responses).

    Not packed, each response is a row with the prompt, padded to the longer response.
    """
    prompts, responses = lengths[:, 0], lengths[:, 1:]
    rows: np.ndarray = responses.shape[1] * (prompts + responses.max(1))
    return lengths.sum(1) if packed else rows


def require_budget(tokens: np.ndarray, max_tokens: int) -> None:
    """Raises UserError if one of these numbers of tokens, (pairs,), is above the budget."""
    longest = int(tokens.max(initial=0))
    if longest > max_tokens:
        raise UserError(
            f"max_tokens_per_device: {max_tokens} is less than the longest pair's {longest} "
            "tokens: raise it, or lower data.max_length"
        )


def _ordered_members(
    lengths: np.ndarray, *, seed: int, epoch: int | None, global_batch_size: int
) -> np.ndarray:
    """Row numbers, (pairs,); consecutive `global_batch_size` of them are a step."""
    count = len(lengths)
    if epoch is None:
        return _longest_first(np.arange(count), lengths, global_batch_size)
    rng = np.random.default_rng([seed, epoch])
    members = _longest_first(rng.permutation(count), lengths, global_batch_size * STEPS_PER_WINDOW)

    # Shuffle each window's full steps.
    num_full = count // global_batch_size
    shuffled = np.arange(num_full)
    for start in range(0, num_full, STEPS_PER_WINDOW):
        in_window = shuffled[start : start + STEPS_PER_WINDOW]
        shuffled[start : start + STEPS_PER_WINDOW] = in_window[rng.permutation(len(in_window))]
    full, rest = np.split(members, [num_full * global_batch_size])
    return np.concatenate([full.reshape(num_full, global_batch_size)[shuffled].ravel(), rest])


def _longest_first(order: np.ndarray, lengths: np.ndarray, window_size: int) -> np.ndarray:
    """Each window of `order` sorted by length, the longest first; equal ones stay in order."""
    window = np.arange(len(order)) // window_size
    in_windows: np.ndarray = order[np.lexsort((-lengths[order], window))]
    return in_windows


def _cut_by_budget(
    tokens: np.ndarray, global_batch_size: int, max_tokens: int, padded: bool
) -> np.ndarray:
    """Where micro-batches begin, so that none has more tokens than the budget."""
    starts = []
    start = total = longest = 0
    for end, count in enumerate(tokens.tolist()):
        total += count
        longest = max(longest, count)
        num_read = longest * (end - start + 1) if padded else total
        if end % global_batch_size == 0 or num_read > max_tokens:
            starts.append(end)
            start = end
            total = longest = count
    return np.array(starts, dtype=np.int64)


class Order:
    """The micro-batches of a complete run, by number.

    Reads the lengths of the split's pairs, never their tokens.

    Attributes:
        spec: what it was made from.
        all_lengths: tokens of prompt and responses of the split's pairs, (all, 1 + responses).
        lengths: the same of the pairs that are read, (pairs, 1 + responses).
        tokens_read: tokens that the model reads for each of them, (pairs,).
        steps_per_epoch, total_steps: optimizer steps.
        max_response_tokens: the largest number of response tokens in a micro-batch.
        first_micro_batches: number of each step's first one, and the end, (total_steps + 1,).

    Raises:
        UserError: the split has no pairs, or one that is longer than the budget.
    """

    def __init__(self, spec: OrderSpec) -> None:
        self.spec = spec
        self.all_lengths = _read_lengths(spec)
        self._rows = _rows_to_read(spec, len(self.all_lengths))
        self.lengths = self.all_lengths[self._rows]
        self._pair_lengths = self.lengths.sum(1)
        self._response_tokens = self.lengths[:, 1:].sum(1)
        self.tokens_read = count_tokens(self.lengths, packed=spec.packed)
        if spec.max_tokens is not None:
            require_budget(self.tokens_read, spec.max_tokens)

        # Steps of the run.
        num_pairs = len(self.lengths)
        self._global_batch_size = spec.global_batch_size or num_pairs
        self.steps_per_epoch = math.ceil(num_pairs / self._global_batch_size)
        self.total_steps = count_steps(self.steps_per_epoch, spec.num_epochs, spec.max_steps)

        # Micro-batches of each step, filled up to a multiple of the workers.
        self._epoch_number = -1
        self.max_response_tokens = 0
        counts = []
        for number in range(math.ceil(self.total_steps / self.steps_per_epoch)):
            epoch = self._epoch_of(number)
            rounds = np.ceil(np.diff(epoch.steps) / spec.num_workers).astype(np.int64)
            counts.append(rounds * spec.num_workers)
            in_micro_batch = self._sum_responses(epoch, epoch.micro_batches)
            self.max_response_tokens = max(self.max_response_tokens, int(in_micro_batch.max()))
        in_step = np.concatenate(counts)[: self.total_steps]
        self.first_micro_batches = np.concatenate([[0], np.cumsum(in_step)])

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of all steps, with the empty ones that fill a step up."""
        return int(self.first_micro_batches[-1])

    def first_micro_batch(self, step: int) -> int:
        """The number of a step's first micro-batch; the end for the step after the last."""
        return int(self.first_micro_batches[step])

    def members(self, number: int) -> tuple[np.ndarray, StepPlace]:
        """Row numbers of a micro-batch of the run, none if it only fills up, and its place."""
        step = int(np.searchsorted(self.first_micro_batches, number, side="right")) - 1
        epoch_number, step_in_epoch = divmod(step, self.steps_per_epoch)
        epoch = self._epoch_of(epoch_number)

        first, end = epoch.steps[step_in_epoch : step_in_epoch + 2]
        index = first + number - self.first_micro_batch(step)
        members = epoch.members[:0]
        if index < end:
            start, stop = epoch.micro_batches[index : index + 2]
            members = self._rows[epoch.members[start:stop]]
        place = StepPlace(
            step=step,
            pairs_in_step=int(epoch.micro_batches[end] - epoch.micro_batches[first]),
            response_tokens_in_step=int(self._step_tokens[step_in_epoch]),
            is_last=number >= self.first_micro_batch(step + 1) - self.spec.num_workers,
        )
        return members, place

    def _epoch_of(self, number: int) -> Epoch:
        if self._epoch_number != number:
            self._epoch_number = number
            self._epoch = order_epoch(
                self._pair_lengths,
                seed=self.spec.seed,
                epoch=number if self.spec.is_shuffled else None,
                global_batch_size=self._global_batch_size,
                micro_batch_size=self.spec.micro_batch_size,
                tokens_read=self.tokens_read,
                max_tokens=self.spec.max_tokens,
                padded=not self.spec.packed,
            )
            starts = self._epoch.micro_batches[self._epoch.steps]
            self._step_tokens = self._sum_responses(self._epoch, starts)
        return self._epoch

    def _sum_responses(self, epoch: Epoch, bounds: np.ndarray) -> np.ndarray:
        """Response tokens between places in `epoch.members`."""
        return np.add.reduceat(self._response_tokens[epoch.members], bounds[:-1])


def _rows_to_read(spec: OrderSpec, num_pairs: int) -> np.ndarray:
    """Row numbers, in the split, of the pairs that are read. Raises UserError for an empty fold."""
    if spec.fold is None:
        return np.arange(num_pairs)
    fold, num_folds = spec.fold
    table = read_split(spec.rows, spec.split, [GROUP_HASH])
    hashes = table[GROUP_HASH].to_numpy()
    require_full_folds(hashes, num_folds)
    return np.flatnonzero(folds_of(hashes, num_folds) != fold)


def _read_lengths(spec: OrderSpec) -> np.ndarray:
    names = [LENGTHS[name] for name in spec.token_columns]
    table = read_split(spec.rows, spec.split, names)
    if table.num_rows == 0:
        raise UserError(
            f"no pair of {spec.rows.parent} is in split {spec.split!r}: see data.split_column "
            "and the fractions"
        )
    return np.stack([table[name].to_numpy() for name in names], axis=1).astype(np.int64)
