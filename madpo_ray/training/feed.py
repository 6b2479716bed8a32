"""A run's micro-batches as a Ray dataset, in order, from any step on."""

import math
from dataclasses import dataclass

import pyarrow as pa
import ray.data

from madpo_ray.data.micro_batches import MicroBatchReader
from madpo_ray.data.order import Order, OrderSpec
from madpo_ray.passes import BatchNotes

# Ray needs milliseconds for each block, however small it is, and every block is in memory.
MAX_BLOCKS = 1024
MAX_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Chunks:
    """Micro-batches start, ..., stop - 1 in chunks, each of one rank.

    Chunk j is of rank j mod W; the chunks of a rank have its micro-batches in order. Both start and
    stop are multiples of W, so that all ranks have equally many.
    """

    start: int
    stop: int
    num_workers: int
    size: int  # micro-batches of a chunk; the last one of a rank may have fewer

    def __len__(self) -> int:
        return self.num_workers * math.ceil(self._per_rank / self.size)

    def numbers(self, chunk: int) -> range:
        """The micro-batches of a chunk."""
        index, rank = divmod(chunk, self.num_workers)
        first = index * self.size
        last = min(first + self.size, self._per_rank)
        begin = self.start + rank
        return range(
            begin + first * self.num_workers, begin + last * self.num_workers, self.num_workers
        )

    @property
    def _per_rank(self) -> int:
        return (self.stop - self.start) // self.num_workers


def cut_into_chunks(order: Order, start_step: int) -> Chunks:
    """Chunks of all micro-batches from a step on."""
    workers = order.spec.num_workers
    stop = order.num_micro_batches
    # A finished run reads nothing, but Ray needs a row.
    start = min(order.first_micro_batch(start_step), stop - workers)
    tokens = int(order.lengths.sum()) * order.total_steps / order.steps_per_epoch
    bytes_per_micro_batch = 4 * tokens / stop
    size = math.ceil((stop - start) / MAX_BLOCKS)
    size = min(size, max(1, int(MAX_BLOCK_BYTES / bytes_per_micro_batch)))
    return Chunks(start, stop, workers, size)


class _ChunkReader:
    """A Ray Data actor that turns the number of a chunk into its micro-batches."""

    def __init__(self, spec: OrderSpec, chunks: Chunks, notes: BatchNotes) -> None:
        self._notes = notes
        self._chunks = chunks
        self._reader = MicroBatchReader(Order(spec))

    def __call__(self, batch: pa.Table) -> pa.Table:
        (chunk,) = batch["id"].to_pylist()
        numbers = self._chunks.numbers(chunk)
        with self._notes.working_on(f"the micro-batches {numbers}"):
            return self._reader.read(numbers)


def micro_batch_dataset(spec: OrderSpec, chunks: Chunks, notes: BatchNotes) -> ray.data.Dataset:
    """The micro-batches of `Order(spec)`, one chunk per block.

    Split over the workers in turn, rank r of W gets the micro-batches r, r + W, r + 2W, ...
    """
    ids = [pa.table({"id": [chunk]}) for chunk in range(len(chunks))]
    return ray.data.from_arrow(ids).map_batches(
        _ChunkReader,
        fn_constructor_kwargs={"spec": spec, "chunks": chunks, "notes": notes},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )
