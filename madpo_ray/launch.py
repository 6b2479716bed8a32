"""A training run on Ray: TorchTrainer around the loop, fed by the plan's dataset; checkpoints and logs."""

import dataclasses
import json
import logging
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn

from madpo_ray import engine as ds
from madpo_ray.batching import MicroBatch, collate
from madpo_ray.cluster import num_threads, ordered_execution, worker_resources
from madpo_ray.config import Config, TrainingConfig
from madpo_ray.loop import Objective, Progress, evaluate, fit
from madpo_ray.metrics import MetricsLog
from madpo_ray.models import DTYPES, shares_prefix
from madpo_ray.plan import TOKEN_COLUMNS, Plan, PlanSpec, micro_batch_dataset
from madpo_ray.progress import training_progress
from madpo_ray.throughput import ModelFlops, peak_flops

logger = logging.getLogger(__name__)


class Task(Protocol):
    """What is trained: the part of a stage that runs inside the workers."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Float columns of the source that the objective reads."""

    def settings(self, config: Config) -> TrainingConfig: ...

    def load(self, config: Config, base: Path, max_response_tokens: int) -> nn.Module:
        """The module that maps a micro-batch to outputs; its `model` is what is trained."""

    def objective(self, config: Config) -> Objective: ...

    def export(
        self, config: Config, model: nn.Module, state: dict[str, torch.Tensor], base: Path, folder: Path
    ) -> None:
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

    def plan(self, num_workers: int, split: str = "train") -> PlanSpec:
        """The order of the pairs to train on, or of those held out."""
        settings, training = self.settings, split == "train"
        return PlanSpec(
            source=self.source,
            split=split,
            columns=self.task.columns,
            seed=self.config.run.seed,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.per_device_train_batch_size if training else settings.per_device_eval_batch_size,
            num_workers=num_workers,
            num_epochs=settings.num_train_epochs if training else 1,
            max_steps=settings.max_steps if training else -1,
            shuffled=training,
        )


def decode_row(row: pa.Table, columns: tuple[str, ...], *, shared_prefix: bool) -> MicroBatch:
    """The micro-batch of a row of `Plan.row`."""
    values = {name: row[name][0].as_py() for name in row.column_names}
    names = ("pair_id", *TOKEN_COLUMNS, *columns)
    pairs = [dict(zip(names, cells, strict=True)) for cells in zip(*(values[name] for name in names), strict=True)]
    batch = collate(pairs, shared_prefix=shared_prefix, column_names=columns)
    scalars = {name: values[name] for name in ("step", "pairs_in_step", "last_of_step")}
    return dataclasses.replace(batch, **scalars)


def newest_step(experiment: Path) -> int:
    """The step of a run's newest checkpoint, by Ray's own record; 0 without one."""
    record = experiment / "checkpoint_manager_snapshot.json"
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
    plan = Plan(job.plan(world))
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
    plan = Plan(job.plan(world, split="validation"))
    return [
        decode_row(plan.row(i), job.task.columns, shared_prefix=shared_prefix)
        for i in range(rank, plan.num_micro_batches, world)
    ]


def train_on_ray(job: TrainingJob, callbacks: list[Any] | None = None) -> None:
    """Runs a job to its end; one of the same name goes on from its newest checkpoint.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than cluster.max_failures allows.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    cluster, settings = job.config.cluster, job.settings
    spec, folder = job.plan(cluster.num_workers), job.storage / job.experiment
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=worker_resources(cluster)
        ),
        datasets={"train": lambda: micro_batch_dataset(spec, newest_step(folder))},
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
    with training_progress(job.experiment.split("-")[0], job.output / "metrics.jsonl", Plan(spec).total_steps):
        trainer.fit()
