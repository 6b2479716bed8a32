"""The order of pairs: which stand in which micro-batch of which step, for any number of workers.

The order is made from (seed, epoch, lengths) alone. A run's micro-batches are numbered over all its steps; each step
is filled up with empty ones to a multiple of the workers, and rank r of W takes numbers r, r + W, r + 2W, ... Imports
no torch: the Ray Data stage that assembles micro-batches should start quickly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray.config import UserError
from madpo_ray.tables import read_split

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class PlanSpec:
    """What decides the order, and where the rows are."""

    source: Path  # folder of Parquet files with tokens and `columns`
    split: str
    columns: tuple[str, ...]
    seed: int
    global_batch_size: int  # pairs of a step
    micro_batch_size: int  # pairs of a forward
    num_workers: int
    num_epochs: int = 1
    max_steps: int = -1
    shuffled: bool = True


# Steps whose pairs are sorted by length together: enough to leave little padding, few enough to keep steps mixed.
STEPS_PER_WINDOW = 16


def plan_epoch(
    lengths: np.ndarray, *, seed: int, epoch: int | None, global_batch_size: int, micro_batch_size: int
) -> list[list[np.ndarray]]:
    """Micro-batches of row numbers, by optimizer step: a function of its arguments alone, never of the number of
    workers.

    `lengths` are the tokens of each pair's row. The pairs are shuffled by (seed, epoch), sorted by length within
    windows of a few steps, cut into steps, and a window's whole steps are shuffled again. `epoch` None keeps the
    pairs in order. The last step may be short; every pair stands in the epoch exactly once.
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
    return [[step[i : i + micro_batch_size] for i in range(0, len(step), micro_batch_size)] for step in steps]


class Plan:
    """The micro-batches of a whole run, as rows of a table.

    Raises:
        UserError: the split has no pairs.
    """

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        self._table = read_split(spec.source, spec.split, ("pair_id", *TOKEN_COLUMNS, *spec.columns))
        if self._table.num_rows == 0:
            raise UserError(
                f"no pair of {spec.source.parent} is in split {spec.split!r}: see data.split_column and the fractions"
            )
        prompt, chosen, rejected = (pc.list_value_length(self._table[name]).to_numpy() for name in TOKEN_COLUMNS)
        self._lengths = prompt + chosen + rejected
        self._responses = chosen + rejected
        self._planned: tuple[int, list[list[np.ndarray]]] | None = None
        self.steps_per_epoch = -(-len(self._lengths) // spec.global_batch_size)
        self.total_steps = spec.max_steps if spec.max_steps > 0 else spec.num_epochs * self.steps_per_epoch

    @property
    def max_response_tokens(self) -> int:
        """A bound on the response tokens of any micro-batch."""
        return int(np.sort(self._responses)[-self._spec.micro_batch_size :].sum())

    @property
    def num_micro_batches(self) -> int:
        return self.total_steps * self.micro_batches_per_step

    @property
    def micro_batches_per_step(self) -> int:
        """Empty ones included, with which each step is filled up to a multiple of the workers."""
        planned = -(-self._spec.global_batch_size // self._spec.micro_batch_size)
        return -(-planned // self._spec.num_workers) * self._spec.num_workers

    def row(self, number: int) -> pa.Table:
        """Micro-batch `number` of the run, counted over all steps, as a table of one row."""
        step, index = divmod(number, self.micro_batches_per_step)
        epoch, within = divmod(step, self.steps_per_epoch)
        members = self._epoch(epoch)[within]
        rows = members[index] if index < len(members) else np.array([], dtype=np.int64)
        return self._row(
            rows,
            step=step,
            pairs_in_step=sum(map(len, members)),
            last_of_step=index >= self.micro_batches_per_step - self._spec.num_workers,
        )

    def _epoch(self, epoch: int) -> list[list[np.ndarray]]:
        if self._planned is None or self._planned[0] != epoch:
            steps = plan_epoch(
                self._lengths,
                seed=self._spec.seed,
                epoch=epoch if self._spec.shuffled else None,
                global_batch_size=self._spec.global_batch_size,
                micro_batch_size=self._spec.micro_batch_size,
            )
            self._planned = (epoch, steps)
        return self._planned[1]

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
    stop = plan.num_micro_batches
    start = min(start_step * plan.micro_batches_per_step, stop - 1)  # a finished run reads nothing, but Ray wants a row
    return ray.data.range(stop - start, override_num_blocks=stop - start).map_batches(
        _PlannedRows,
        fn_constructor_kwargs={"spec": spec, "start": start},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )
