"""A run's micro-batches as a Ray dataset, in order, from any step on."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import ray.data

from madpo_ray.data.micro_batches import MicroBatchReader, pairs_of, with_columns
from madpo_ray.data.order import Order, OrderSpec
from madpo_ray.passes import REFUSAL, BatchNotes, find_refusal, pool_options
from madpo_ray.scoring.actors import ScoringActor
from madpo_ray.scoring.streamed import StreamedScores

# Ray needs milliseconds for each block, however small it is, and every block is in memory.
MAX_BLOCKS = 1024
MAX_BLOCK_BYTES = 32 * 2**20
# Between two rounds of Ray Data's scheduler. A round without tasks waits for nothing: while the
# object store is full of chunks that no rank has read yet, it would keep a core busy.
SCHEDULER_ROUND_S = 0.05


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


def cut_into_chunks(
    order: Order, start_step: int, stop_step: int | None = None, max_pairs: int | None = None
) -> Chunks:
    """Chunks of all micro-batches from a step on, up to another or to the end.

    Args:
        max_pairs: about so many pairs in a chunk, at most.
    """
    workers = order.spec.num_workers
    stop = order.num_micro_batches
    if stop_step is not None:
        stop = order.first_micro_batch(stop_step)
    # A finished run reads nothing, but Ray needs a row.
    start = min(order.first_micro_batch(start_step), stop - workers)
    tokens = int(order.lengths.sum()) * order.total_steps / order.steps_per_epoch
    bytes_per_micro_batch = 4 * tokens / order.num_micro_batches
    size = math.ceil((stop - start) / MAX_BLOCKS)
    size = min(size, max(1, int(MAX_BLOCK_BYTES / bytes_per_micro_batch)))
    if max_pairs is not None:
        pairs = len(order.lengths) * order.total_steps / order.steps_per_epoch
        size = min(size, max(1, int(max_pairs * order.num_micro_batches / pairs)))
    return Chunks(start, stop, workers, size)


class _ChunkReader:
    """A Ray Data actor that turns the number of a chunk into its micro-batches."""

    def __init__(
        self,
        spec: OrderSpec,
        chunks: Chunks,
        notes: BatchNotes,
        complete: Callable[[pa.Table], pa.Table] | None,
    ) -> None:
        self._notes = notes
        self._chunks = chunks
        self._reader = MicroBatchReader(Order(spec), complete)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (chunk,) = batch["id"].to_pylist()
        numbers = self._chunks.numbers(chunk)
        with self._notes.working_on(f"the micro-batches {numbers}"):
            return self._reader.read(numbers)


class _ChunkScorer:
    """A Ray Data actor that scores the pairs of a chunk on their way to a rank."""

    def __init__(self, spec: OrderSpec, streamed: StreamedScores, notes: BatchNotes) -> None:
        self._token_columns = spec.token_columns
        self._streamed = streamed
        num_threads = streamed.actors.num_threads
        self._actor = ScoringActor(streamed.scorers, num_threads, notes, streamed.kept)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        pairs = pairs_of(chunk, self._token_columns)
        chunk = chunk.drop_columns(list(self._streamed.text_columns))
        if pairs.num_rows == 0:  # it only fills up
            empty = pa.array([], pa.float64())
            return with_columns(chunk, pa.table(dict.fromkeys(self._streamed.columns, empty)))
        scored = self._actor(pairs)
        if (refusal := find_refusal(scored)) is not None:
            return chunk.append_column(REFUSAL, pa.repeat(refusal, chunk.num_rows))
        return with_columns(chunk, self._streamed.numbers(pairs, scored))


class Pacing:
    """Ray Data's hooks into an execution: one round of its scheduler in `SCHEDULER_ROUND_S`."""

    def __init__(self) -> None:
        self._last_round = time.monotonic()

    def before_execution_starts(self, executor: object) -> None:
        pass

    def on_execution_step(self, executor: object) -> None:
        elapsed = time.monotonic() - self._last_round
        time.sleep(max(0.0, SCHEDULER_ROUND_S - elapsed))
        self._last_round = time.monotonic()

    def after_execution_succeeds(self, executor: object) -> None:
        pass

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        pass


def micro_batch_dataset(
    spec: OrderSpec,
    chunks: Chunks,
    notes: BatchNotes,
    complete: Callable[[pa.Table], pa.Table] | None = None,
) -> ray.data.Dataset:
    """The micro-batches of `Order(spec)`, one chunk per block.

    Split over the workers in turn, rank r of W gets the micro-batches r, r + W, r + 2W, ...

    Args:
        complete: adds the columns that the stored rows lack, to the table of a split's pairs.
    """
    ids = [pa.table({"id": [chunk]}) for chunk in range(len(chunks))]
    dataset = ray.data.from_arrow(ids)
    dataset.context.custom_execution_callback_classes = [Pacing]
    return dataset.map_batches(
        _ChunkReader,
        fn_constructor_kwargs={
            "spec": spec,
            "chunks": chunks,
            "notes": notes,
            "complete": complete,
        },
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )


def scored_dataset(
    spec: OrderSpec,
    chunks: Chunks,
    notes: BatchNotes,
    streamed: StreamedScores,
) -> ray.data.Dataset:
    """`micro_batch_dataset`, whose pairs are scored while they flow."""
    spec = dataclasses.replace(spec, text_columns=streamed.text_columns)
    return micro_batch_dataset(spec, chunks, notes).map_batches(
        _ChunkScorer,
        fn_constructor_kwargs={
            "spec": spec,
            "streamed": streamed,
            "notes": notes,
        },
        batch_size=None,
        batch_format="pyarrow",
        **pool_options(streamed.actors),
    )


Datasets = Mapping[str, Callable[[], ray.data.Dataset]]


def datasets_of(
    order: Order,
    start_step: int,
    notes: BatchNotes,
    streamed: StreamedScores | None,
) -> Datasets:
    """The datasets that a training reads one after the other, each made when Ray Train asks.

    Without streamed scores there is one. With them, the steps of the first epoch are another: what
    follows reads the scores of all pairs, and no rank asks for it before they are there.
    """
    spec = order.spec
    complete = None if streamed is None else streamed.complete
    if streamed is None or not streamed.scorers:
        chunks = cut_into_chunks(order, start_step)
        return {"train": lambda: micro_batch_dataset(spec, chunks, notes, complete)}

    datasets: dict[str, Callable[[], ray.data.Dataset]] = {}
    first_stop = min(order.steps_per_epoch, order.total_steps)
    if start_step < first_stop:
        first = cut_into_chunks(order, start_step, first_stop, streamed.batch_size)
        datasets["first_epoch"] = lambda: scored_dataset(spec, first, notes, streamed)
    if first_stop < order.total_steps or not datasets:
        rest = cut_into_chunks(order, max(start_step, first_stop))
        datasets["train"] = lambda: micro_batch_dataset(spec, rest, notes, complete)
    return datasets
