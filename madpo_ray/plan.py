"""The order of pairs: which stand in which micro-batch of which step, for any number of workers.

The order is made from (seed, epoch, lengths) alone. A run's micro-batches are numbered over all its steps; each step
is filled up with empty ones to a multiple of the workers, and rank r of W takes numbers r, r + W, r + 2W, ... Imports
no torch: the Ray Data stage that assembles micro-batches should start quickly.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray.config import UserError
from madpo_ray.tables import read_split, read_split_whole

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class PlanSpec:
    """What decides the order, and where the rows are."""

    source: Path  # folder of Parquet files with tokens and `columns`
    split: str
    columns: tuple[str, ...]
    seed: int
    global_batch_size: int | None  # pairs of a step; None: all of them
    micro_batch_size: int  # pairs of a forward, where no budget is given
    num_workers: int
    max_tokens: int | None = None  # of a forward, padding included
    shared_prefix: bool = True  # what a pair's row holds, for its length
    responses: tuple[str, ...] = TOKEN_COLUMNS[1:]
    num_epochs: int = 1
    max_steps: int = -1
    shuffled: bool = True


# Steps whose pairs are sorted by length together: enough to leave little padding, few enough to keep steps mixed.
STEPS_PER_WINDOW = 16

Step = list[np.ndarray]  # micro-batches of row numbers


def plan_epoch(
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    read_tokens: np.ndarray | None = None,
    max_tokens: int | None = None,
) -> list[Step]:
    """Micro-batches of row numbers, by optimizer step: a function of its arguments alone, never of the number of
    workers.

    `lengths` are the tokens of each pair. The pairs are shuffled by (seed, epoch), sorted by
    length within windows of a few steps, cut into steps, and a window's whole steps are shuffled again. `epoch` None
    keeps the pairs in order. The last step may be short; every pair stands in the epoch exactly once. A step is cut
    into micro-batches of `micro_batch_size` pairs, or of at most `max_tokens` tokens when padded to the longest, of
    `read_tokens` that the model reads for each pair (the pair's own, unless given).
    """
    rng = None if epoch is None else np.random.default_rng([seed, epoch])
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    window = global_batch_size * (1 if rng is None else STEPS_PER_WINDOW)
    steps = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        members = members[np.argsort(-lengths[members], kind="stable")]
        cut = [members[i : i + global_batch_size] for i in range(0, len(members), global_batch_size)]
        if rng is not None:
            whole = len(members) // global_batch_size
            cut[:whole] = [cut[i] for i in rng.permutation(whole)]
        steps += cut
    if max_tokens is None:
        return [[step[i : i + micro_batch_size] for i in range(0, len(step), micro_batch_size)] for step in steps]
    tokens = lengths if read_tokens is None else read_tokens
    return [_within_budget(step, tokens, max_tokens) for step in steps]


def _within_budget(members: np.ndarray, tokens: np.ndarray, max_tokens: int) -> Step:
    """Cuts a step so that no micro-batch is padded to more tokens than the budget."""
    cut, start, longest = [], 0, 0
    for end, count in enumerate(tokens[members].tolist()):
        if end > start and max(longest, count) * (end - start + 1) > max_tokens:
            cut.append(members[start:end])
            start, longest = end, 0
        longest = max(longest, count)
    return [*cut, members[start:]]


class _Epoch(NamedTuple):
    """An epoch's steps, and what each of them holds over all its micro-batches."""

    number: int
    steps: list[Step]
    pairs: list[int]
    response_tokens: list[int]


class Plan:
    """The micro-batches of a whole run, as rows of a table. Holds lengths alone until a row is asked for.

    Raises:
        UserError: the split has no pairs, or one that is longer than the budget.
    """

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        tokens = read_split(spec.source, spec.split, self._token_columns)
        if tokens.num_rows == 0:
            raise UserError(
                f"no pair of {spec.source.parent} is in split {spec.split!r}: see data.split_column and the fractions"
            )
        prompt, *responses = (pc.list_value_length(tokens[name]).to_numpy() for name in self._token_columns)
        self._responses = np.sum(responses, axis=0)  # response tokens of each pair
        self._lengths = prompt + self._responses
        alone = len(responses) * (prompt + np.max(responses, axis=0))  # a row for each response
        self._read_tokens = self._lengths if spec.shared_prefix else alone
        self._refuse_over_budget()
        self._global_batch_size = spec.global_batch_size or len(prompt)
        self._planned: _Epoch | None = None
        self.steps_per_epoch = -(-len(prompt) // self._global_batch_size)
        self.total_steps = spec.max_steps if spec.max_steps > 0 else spec.num_epochs * self.steps_per_epoch
        self.max_response_tokens = 0  # of any micro-batch
        counts = []
        for epoch in range(-(-self.total_steps // self.steps_per_epoch)):
            for step in self._epoch(epoch).steps:
                counts.append(-(-len(step) // spec.num_workers) * spec.num_workers)
                most = max(int(self._responses[rows].sum()) for rows in step)
                self.max_response_tokens = max(self.max_response_tokens, most)
        self._first = np.concatenate([[0], np.cumsum(counts[: self.total_steps])])  # row of each step, and the end

    @property
    def num_rows(self) -> int:
        """Micro-batches of all steps, with the empty ones that fill each step up to a multiple of the workers."""
        return int(self._first[-1])

    def first_row(self, step: int) -> int:
        """The number of a step's first micro-batch; of one past the end for the step past the last."""
        return int(self._first[step])

    def row(self, number: int) -> pa.Table:
        """Micro-batch `number` of the run, counted over all steps, as a table of one row."""
        step = int(np.searchsorted(self._first, number, side="right")) - 1
        index = number - self.first_row(step)
        number_of_epoch, within = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number_of_epoch)
        members = epoch.steps[within]
        rows = members[index] if index < len(members) else np.array([], dtype=np.int64)
        return self._row(
            rows,
            step=step,
            pairs_in_step=epoch.pairs[within],
            response_tokens_in_step=epoch.response_tokens[within],
            last_of_step=number >= self.first_row(step + 1) - self._spec.num_workers,
        )

    def _refuse_over_budget(self) -> None:
        longest, budget = int(self._read_tokens.max()), self._spec.max_tokens
        if budget is not None and longest > budget:
            raise UserError(
                f"max_tokens_per_device: {budget} is less than the longest pair's {longest} tokens: raise it, or lower "
                "data.max_length"
            )

    @property
    def _token_columns(self) -> tuple[str, ...]:
        return (TOKEN_COLUMNS[0], *self._spec.responses)

    @functools.cached_property
    def _table(self) -> pa.Table:
        columns = ("pair_id", *self._token_columns, *self._spec.columns)
        return read_split_whole(self._spec.source, self._spec.split, columns)

    def _epoch(self, epoch: int) -> _Epoch:
        if self._planned is None or self._planned.number != epoch:
            steps = plan_epoch(
                self._lengths,
                seed=self._spec.seed,
                epoch=epoch if self._spec.shuffled else None,
                global_batch_size=self._global_batch_size,
                micro_batch_size=self._spec.micro_batch_size,
                read_tokens=self._read_tokens,
                max_tokens=self._spec.max_tokens,
            )
            self._planned = _Epoch(
                epoch,
                steps,
                pairs=[sum(map(len, step)) for step in steps],
                response_tokens=[int(self._responses[np.concatenate(step)].sum()) for step in steps],
            )
        return self._planned

    def _row(self, rows: np.ndarray, **scalars: Any) -> pa.Table:
        taken = self._table.take(rows)
        columns = {name: pa.array([value]) for name, value in scalars.items()}
        for name in taken.column_names:
            values = taken[name].combine_chunks()
            columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(rows)], type=pa.int64()), values)
        return pa.table(columns)


class _PlannedRows:
    """A Ray Data stage that turns the number of a micro-batch into its row."""

    def __init__(self, spec: PlanSpec, start: int) -> None:
        self._plan, self._start = Plan(spec), start

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables([self._plan.row(self._start + number) for number in batch["id"].to_pylist()])


def micro_batch_dataset(spec: PlanSpec, start_step: int) -> Any:
    """The run's micro-batches from a step on, as a Ray dataset with one row a block, to be split over the workers in
    turn."""
    import ray.data

    plan = Plan(spec)
    stop = plan.num_rows
    start = min(plan.first_row(start_step), stop - 1)  # a finished run reads nothing, but Ray wants a row
    return ray.data.range(stop - start, override_num_blocks=stop - start).map_batches(
        _PlannedRows,
        fn_constructor_kwargs={"spec": spec, "start": start},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )
