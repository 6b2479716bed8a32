"""A training run on Ray: the plan of micro-batches as a Ray dataset, TorchTrainer around the loop, checkpoints and logs.

The order is a plan made from (seed, epoch, lengths) alone. One row of the dataset is one micro-batch and one block; blocks are dealt
to the ranks in turn, so rank r of W reads rows r, r + W, r + 2W, ... Each step is filled up with empty micro-batches to a multiple of W.
"""

import dataclasses
import functools
import json
import logging
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import nn

from madpo_ray import engine as ds
from madpo_ray.batching import TOKEN_COLUMNS, MicroBatch, collate, plan_epoch
from madpo_ray.cluster import num_threads, ordered_execution, worker_resources
from madpo_ray.config import Config, TrainingConfig, UserError
from madpo_ray.loop import Objective, Progress, evaluate, fit
from madpo_ray.metrics import MetricsLog
from madpo_ray.models import DTYPES, shares_prefix
from madpo_ray.progress import training_progress
from madpo_ray.tables import read_split
from madpo_ray.throughput import ModelFlops, peak_flops

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What is trained: the part of a stage that runs inside the workers."""

    columns: tuple[str, ...]  # float columns of the source that the objective reads

    def settings(self, config: Config) -> TrainingConfig: ...

    def load(self, config: Config, base: Path, max_response_tokens: int) -> nn.Module:
        """The module that maps a micro-batch to outputs; its `model` is what is trained."""

    def objective(self, config: Config) -> Objective: ...

    def export(self, config: Config, model: nn.Module, state: dict[str, torch.Tensor], base: Path, folder: Path) -> None:
        """Writes the trained model; on rank 0 only."""


@dataclass(frozen=True)
class TrainingJob:
    """All that a worker needs to know; travels to it pickled."""

    task: Task
    config: Config
    base: Path  # the base model's folder
    source: Path  # folder of Parquet files with tokens and the task's columns
    output: Path  # gets metrics.jsonl and tensorboard/
    experiment: str  # names the run in Ray's storage; the same name resumes
    export: bool = True  # write the model to output/model

    @property
    def settings(self) -> TrainingConfig:
        return self.task.settings(self.config)

    @property
    def storage(self) -> Path:
        return self.config.run.folder / "ray"


class Plan:
    """The micro-batches of a whole run, in order, as rows of a table."""

    def __init__(self, job: TrainingJob, num_workers: int, split: str = "train") -> None:
        settings = job.settings
        self._table = read_split(job.source, split, ("pair_id", *TOKEN_COLUMNS, *job.task.columns))
        if self._table.num_rows == 0:
            raise UserError(f"no pair of {job.source.parent} is in split {split!r}; see the data section's fractions or split_column")
        lengths = [pc.list_value_length(self._table[name]).to_numpy() for name in TOKEN_COLUMNS]
        self.lengths = np.sum(lengths, axis=0)
        self.max_response_tokens = self._max_response_tokens(lengths[1] + lengths[2], settings)
        self.max_length = int((lengths[0] + np.maximum(lengths[1], lengths[2])).max())
        self._seed, self._num_workers = job.config.run.seed, num_workers
        self._training = split == "train"
        self._planned: tuple[int, list[list[np.ndarray]]] | None = None
        self._global = settings.global_batch_size
        self._micro = settings.per_device_train_batch_size if self._training else settings.per_device_eval_batch_size
        self.steps_per_epoch = -(-len(self.lengths) // self._global)
        epochs = settings.num_train_epochs * self.steps_per_epoch
        self.total_steps = settings.max_steps if settings.max_steps > 0 else epochs

    @staticmethod
    def _max_response_tokens(responses: np.ndarray, settings: TrainingConfig) -> int:
        largest = max(settings.per_device_train_batch_size, settings.per_device_eval_batch_size)
        return int(np.sort(responses)[-largest:].sum())

    @property
    def micro_batches_per_step(self) -> int:
        """Empty ones included, with which each step is filled up to a multiple of the workers."""
        planned = -(-self._global // self._micro)
        return -(-planned // self._num_workers) * self._num_workers

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
            last_of_step=index >= self.micro_batches_per_step - self._num_workers,
        )

    def _epoch(self, epoch: int) -> list[list[np.ndarray]]:
        if self._planned is None or self._planned[0] != epoch:
            steps = plan_epoch(
                self.lengths,
                seed=self._seed,
                epoch=epoch if self._training else None,
                global_batch_size=self._global,
                micro_batch_size=self._micro,
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


def decode_row(row: pa.Table, columns: tuple[str, ...], *, shared_prefix: bool) -> MicroBatch:
    """The micro-batch of a row of `Plan.rows`."""
    values = {name: row[name][0].as_py() for name in row.column_names}
    names = ("pair_id", *TOKEN_COLUMNS, *columns)
    pairs = [dict(zip(names, cells, strict=True)) for cells in zip(*(values[name] for name in names), strict=True)]
    batch = collate(pairs, shared_prefix=shared_prefix, column_names=columns)
    scalars = {name: values[name] for name in ("step", "pairs_in_step", "last_of_step")}
    return dataclasses.replace(batch, **scalars)


class _PlannedRows:
    """A Ray Data stage that turns the number of a micro-batch into its row."""

    def __init__(self, job: TrainingJob, num_workers: int, start: int) -> None:
        self._plan, self._start = Plan(job, num_workers), start

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables([self._plan.row(self._start + number) for number in batch["id"].to_pylist()])


def micro_batch_dataset(job: TrainingJob, num_workers: int) -> Any:
    """The run's micro-batches as a Ray dataset, from the step of the newest checkpoint on."""
    import ray.data

    plan = Plan(job, num_workers)
    start, stop = (step * plan.micro_batches_per_step for step in (newest_step(job), plan.total_steps))
    count = max(stop - start, 1)  # a finished run reads nothing, but Ray wants a row
    return ray.data.range(count, override_num_blocks=count).map_batches(
        _PlannedRows,
        fn_constructor_kwargs={"job": job, "num_workers": num_workers, "start": min(start, stop - 1)},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )


def newest_step(job: TrainingJob) -> int:
    """The step of the run's newest checkpoint, by Ray's own record; 0 without one."""
    record = job.storage / job.experiment / "checkpoint_manager_snapshot.json"
    latest = json.loads(record.read_text())["latest_checkpoint_result"] if record.exists() else None
    return int(latest["metrics"]["step"]) if latest else 0


class RunReporter:
    """Writes metrics on rank 0 and hands checkpoints to Ray Train. Ray's report is a barrier: every rank calls it."""

    def __init__(self, engine: Any, objective: Objective, log: MetricsLog | None) -> None:
        self._engine, self._objective, self._log = engine, objective, log

    def log(self, progress: Progress, metrics: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(progress.step, metrics | {"peak_memory_bytes": _peak_memory_bytes()})

    def report(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None:
        import ray.train

        if self._log is not None and metrics:
            self._log.write(progress.step, metrics)
        numbers = {"step": progress.step, **metrics}
        if not save:
            ray.train.report(numbers)
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {"progress": progress.state_dict(), "objective": self._objective.state_dict()}
            ds.save(self._engine, Path(folder), state)
            ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _peak_memory_bytes() -> int:
    """Of this rank: on the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_worker(spec: dict[str, TrainingJob]) -> None:
    """What every rank runs: load, restore, fit, export."""
    import ray.train

    job, context = spec["job"], ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(num_threads(job.config.cluster))
    torch.manual_seed(job.config.run.seed)
    plan = Plan(job, world)
    module = job.task.load(job.config, job.base, plan.max_response_tokens)
    shared = shares_prefix(module.model, job.config.model, plan.max_length)  # type: ignore[arg-type]
    flops = ModelFlops(module.model)  # type: ignore[arg-type]
    engine = ds.initialize(module, job.settings, dtype=job.config.model.dtype, total_steps=plan.total_steps)
    objective, progress = job.task.objective(job.config), Progress()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = ds.load(engine, Path(folder))
        progress = Progress(**state["progress"])
        objective.load_state_dict(state["objective"])
    log = MetricsLog(job.output, progress.step) if rank == 0 else None
    held_out = _held_out(job, rank, world, shared_prefix=shared)
    if progress.step < plan.total_steps:
        fit(
            engine,
            objective,
            _own_batches(job, progress.step, shared_prefix=shared),
            job.settings,
            progress=progress,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            evaluate=lambda: evaluate(engine, objective, held_out, engine.device),
            reporter=RunReporter(engine, objective, log),
            flops=flops,
            peak_flops=peak_flops(DTYPES[job.config.model.dtype], engine.device),
        )
    if job.export:
        state = ds.full_state(engine, module.model)  # type: ignore[arg-type]
        if rank == 0:
            job.task.export(job.config, module.model, state, job.base, job.output / "model")  # type: ignore[arg-type]
        dist.barrier()
    if log is not None:
        log.close()


def _own_batches(job: TrainingJob, start_step: int, *, shared_prefix: bool) -> Iterator[MicroBatch]:
    import ray.train

    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    for row in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4):
        # The dataset starts at the newest checkpoint that Ray recorded; what is restored decides.
        if row["step"][0].as_py() >= start_step:
            yield decode_row(row, job.task.columns, shared_prefix=shared_prefix)


def _held_out(job: TrainingJob, rank: int, world: int, *, shared_prefix: bool) -> list[MicroBatch]:
    """This rank's share of the validation pairs, filled up so that every rank has equally many micro-batches."""
    plan = Plan(job, world, split="validation")
    count = plan.steps_per_epoch * plan.micro_batches_per_step
    return [decode_row(plan.row(i), job.task.columns, shared_prefix=shared_prefix) for i in range(rank, count, world)]


def train_on_ray(job: TrainingJob, callbacks: list[Any] | None = None) -> None:
    """Runs a job to its end; one of the same name goes on from its newest checkpoint.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than cluster.max_failures allows.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    cluster, settings = job.config.cluster, job.settings
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=worker_resources(cluster)
        ),
        datasets={"train": functools.partial(micro_batch_dataset, job, cluster.num_workers)},
        dataset_config=ray.train.DataConfig(
            datasets_to_split=["train"], execution_options=ordered_execution(), enable_shard_locality=False
        ),
        run_config=ray.train.RunConfig(
            name=job.experiment,
            storage_path=str(job.storage),
            callbacks=callbacks,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.save_total_limit),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=-1 if cluster.autoscaling else 3
            ),
        ),
    )
    steps = Plan(job, cluster.num_workers).total_steps
    with training_progress(job.experiment.split("-")[0], job.output / "metrics.jsonl", steps):
        trainer.fit()
