"""A run's micro-batches as a Ray dataset, in order, from any step on."""

import numpy as np
import pyarrow as pa
import ray.data

from madpo_ray.data.order import Order, OrderSpec
from madpo_ray.passes import BatchNotes


class _OrderedRows:
    """A Ray Data actor that turns the number of a micro-batch into its row."""

    def __init__(self, spec: OrderSpec, start: int, notes: BatchNotes) -> None:
        self._notes = notes
        self._order = Order(spec)
        self._start = start

    def __call__(self, batch: pa.Table) -> pa.Table:
        numbers = [self._start + number for number in batch["id"].to_pylist()]
        with self._notes.working_on(f"the micro-batches {numbers}"):
            return pa.concat_tables([self._order.micro_batch(number) for number in numbers])


def micro_batch_dataset(
    spec: OrderSpec, first_micro_batches: np.ndarray, start_step: int, notes: BatchNotes
) -> ray.data.Dataset:
    """The micro-batches of `Order(spec)` from a step on, one row per block.

    Split over the workers in turn, they give rank r of W the rows r, r + W, r + 2W, ...

    Args:
        first_micro_batches: those of `Order(spec)`, so that the order is not made again for them.
    """
    stop = int(first_micro_batches[-1])
    # A finished run reads nothing, but Ray needs a row.
    start = min(int(first_micro_batches[start_step]), stop - 1)
    return ray.data.range(stop - start, override_num_blocks=stop - start).map_batches(
        _OrderedRows,
        fn_constructor_kwargs={"spec": spec, "start": start, "notes": notes},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )
