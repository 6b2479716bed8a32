"""What every rank of a training runs: load, restore, fit, export. Knows no Ray: a `Site` says where it runs."""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn

from madpo_ray import engine as ds
from madpo_ray.batching import MicroBatch, collate
from madpo_ray.cluster import num_threads
from madpo_ray.config import Config, TrainingConfig
from madpo_ray.loop import Objective, Progress, evaluate, fit
from madpo_ray.metrics import MetricsLog
from madpo_ray.models import DTYPES, shares_prefix
from madpo_ray.plan import TOKEN_COLUMNS, Plan, PlanSpec
from madpo_ray.throughput import ModelFlops, peak_flops


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
    output: Path  # gets model/, metrics.jsonl and tensorboard/ at the end
    experiment: str  # names the run in Ray's storage; the same name resumes
    export: bool = True  # write to output; Tune's trials do not

    @property
    def settings(self) -> TrainingConfig:
        return self.task.settings(self.config)

    @property
    def checkpoints(self) -> Path:
        """The run's folder in Ray's storage."""
        return self.config.run.folder / "ray" / self.experiment

    @property
    def metrics(self) -> Path:
        """Where metrics are written on the way: beside the checkpoints, so that they survive what those survive."""
        return self.checkpoints / "metrics"

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


class Site(Protocol):
    """Where a rank runs: its place among the ranks, its rows, its checkpoints."""

    rank: int
    world_size: int

    def rows(self, start_step: int) -> Iterable[pa.Table]:
        """This rank's rows of the plan, in order, from a step on (earlier ones may come along)."""

    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint to start from."""

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        """Hands numbers, and perhaps this rank's part of a checkpoint, to whoever started the run. A barrier."""


@dataclass
class Local:
    """One rank in this process, without Ray: for benchmarks and tests."""

    job: TrainingJob
    rank: int = 0
    world_size: int = 1

    def rows(self, start_step: int) -> Iterator[pa.Table]:
        plan = Plan(self.job.plan(1))
        return map(plan.row, range(start_step * plan.micro_batches_per_step, plan.num_micro_batches))

    def checkpoint(self) -> Path | None:
        return None

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        pass


class RunReporter:
    """Writes metrics on rank 0, and hands them and checkpoints to the site."""

    def __init__(self, site: Site, engine: Any, objective: Objective, log: MetricsLog | None) -> None:
        self._site, self._engine, self._objective, self._log = site, engine, objective, log

    def log(self, progress: Progress, metrics: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(progress.step, metrics)

    def report(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None:
        if self._log is not None and metrics:
            self._log.write(progress.step, metrics)
        numbers = {"step": progress.step, **metrics}
        if not save:
            self._site.report(numbers, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {"progress": progress.state_dict(), "objective": self._objective.state_dict()}
            ds.save(self._engine, Path(folder), state)
            self._site.report(numbers, Path(folder))


def train_rank(job: TrainingJob, site: Site) -> None:
    """Trains from the site's checkpoint, or from the start, to the end, and exports the model."""
    torch.set_num_threads(num_threads(job.config.cluster))
    torch.manual_seed(job.config.run.seed)
    plan = Plan(job.plan(site.world_size))
    held_out_plan = Plan(job.plan(site.world_size, split="validation"))
    bound = max(plan.max_response_tokens, held_out_plan.max_response_tokens)
    module = job.task.load(job.config, job.base, bound)
    torch.manual_seed(job.config.run.seed + site.rank)  # the same weights on all ranks, dropout of each rank its own
    model: Any = module.model
    shared = shares_prefix(model, job.config.model)
    flops = ModelFlops(model)
    engine = ds.initialize(module, job.settings, dtype=job.config.model.dtype, total_steps=plan.total_steps)
    # Before the checkpoint restores the random state, which measuring draws from.
    machine_flops = ds.sum_over_ranks(peak_flops(DTYPES[job.config.model.dtype], engine.device), engine.device)
    objective, progress = job.task.objective(job.config), Progress()
    checkpoint = site.checkpoint()
    if checkpoint is not None:
        state = ds.load(engine, checkpoint)
        progress = Progress(**state["progress"])
        objective.load_state_dict(state["objective"])
    log = MetricsLog(job.metrics, progress.step) if site.rank == 0 else None
    held_out = _held_out(job, held_out_plan, site, shared_prefix=shared)
    if progress.step < plan.total_steps:
        fit(
            engine,
            objective,
            _own_batches(job, site, progress.step, shared_prefix=shared),
            job.settings,
            progress=progress,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            evaluate=lambda: evaluate(engine, objective, held_out, engine.device),
            reporter=RunReporter(site, engine, objective, log),
            flops=flops,
            machine_flops=machine_flops,
        )
    if job.export:
        state = ds.full_state(engine, model)
        if site.rank == 0:
            job.task.export(job.config, model, state, job.base, job.output / "model")
        dist.barrier()
    if log is not None:
        log.close()


def _own_batches(job: TrainingJob, site: Site, start_step: int, *, shared_prefix: bool) -> Iterator[MicroBatch]:
    for row in site.rows(start_step):
        if row["step"][0].as_py() >= start_step:
            yield decode_row(row, job.task.columns, shared_prefix=shared_prefix)


def _held_out(job: TrainingJob, plan: Plan, site: Site, *, shared_prefix: bool) -> list[MicroBatch]:
    """This rank's share of the validation pairs, filled up so that every rank has equally many micro-batches."""
    own = range(site.rank, plan.num_micro_batches, site.world_size)
    return [decode_row(plan.row(i), job.task.columns, shared_prefix=shared_prefix) for i in own]


def decode_row(row: pa.Table, columns: tuple[str, ...], *, shared_prefix: bool) -> MicroBatch:
    """The micro-batch of a row of `Plan.row`."""
    values = {name: row[name][0].as_py() for name in row.column_names}
    names = ("pair_id", *TOKEN_COLUMNS, *columns)
    pairs = [dict(zip(names, cells, strict=True)) for cells in zip(*(values[name] for name in names), strict=True)]
    batch = collate(pairs, shared_prefix=shared_prefix, column_names=columns)
    scalars = {name: values[name] for name in ("step", "pairs_in_step", "last_of_step")}
    return dataclasses.replace(batch, **scalars)
