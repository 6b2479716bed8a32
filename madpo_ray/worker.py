"""What every rank of a training runs: load, restore, fit, export. Knows no Ray: a `Site` says where it runs."""

import dataclasses
import os
import shutil
import tempfile
import time
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
from madpo_ray.loop import Notice, Objective, Progress, evaluate, fit
from madpo_ray.metrics import MetricsLog
from madpo_ray.models import DTYPES, merge_adapter, save_whole, saved_tensors, takes_shared_rows
from madpo_ray.plan import TOKEN_COLUMNS, Plan, PlanSpec
from madpo_ray.throughput import ModelFlops, peak_flops


class Task(Protocol):
    """What is trained: the part of a stage that runs inside the workers."""

    @property
    def task_type(self) -> str:
        """What peft calls it: CAUSAL_LM or SEQ_CLS."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Float columns of the source that the objective reads."""

    @property
    def responses(self) -> tuple[str, ...]:
        """Which responses of a pair the model reads: chosen_ids, rejected_ids."""

    def settings(self, config: Config) -> TrainingConfig: ...

    def load(self, config: Config, base: Path, max_response_tokens: int) -> nn.Module:
        """The module that maps a micro-batch to outputs; its `model` is what is trained."""

    def objective(self, config: Config) -> Objective: ...

    def tokenizer(self, config: Config, base: Path) -> Any:
        """What is saved beside the trained model."""

    def fresh_base(self, config: Config, base: Path) -> nn.Module | None:
        """A whole model to merge trained LoRA into, on rank 0; None where the adapter itself is the result."""


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
    deadline: float | None = None  # time.time() at which to save and leave

    @property
    def settings(self) -> TrainingConfig:
        return self.task.settings(self.config)

    @property
    def shared_prefix(self) -> bool:
        """Whether a pair is one row [prompt | chosen | rejected]."""
        return len(self.task.responses) > 1 and takes_shared_rows(self.base, self.config.model)

    @property
    def checkpoints(self) -> Path:
        """The run's folder in Ray's storage."""
        return self.config.run.folder / "ray" / self.experiment

    @property
    def stop_file(self) -> Path:
        """Once something stands in it, every rank saves and leaves after its step.

        It is there, empty, before the ranks start: NFS remembers for a minute that a file was missing, but looks anew
        at what stands in one that is opened.
        """
        return self.checkpoints / "stop"

    def told_to_stop(self) -> bool:
        return self.stop_file.exists() and bool(self.stop_file.read_bytes())

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
            global_batch_size=settings.global_batch_size if training else None,
            micro_batch_size=settings.per_device_train_batch_size if training else settings.per_device_eval_batch_size,
            max_tokens=settings.max_tokens_per_device,
            shared_prefix=self.shared_prefix,
            responses=self.task.responses,
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

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        """Hands numbers, and perhaps this rank's part of a checkpoint, to whoever started the run. A barrier."""

    def node_is_leaving(self) -> bool:
        """Whether a node of the run is about to be taken away. A barrier."""


def join_ranks(rank: int, world_size: int, store: Path) -> None:
    """Makes this process a rank of a gloo group on this machine; `store` is a file that all ranks name."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(place) for name, place in places.items()}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


class Local:
    """A rank that `join_ranks` made, without Ray: for benchmarks and tests.

    Checkpoints go to the job's folder as they do on Ray; the ranks share a file system.
    """

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def rows(self, start_step: int) -> Iterator[pa.Table]:
        plan = Plan(self._job.plan(self.world_size))
        return map(plan.row, range(plan.first_row(start_step) + self.rank, plan.num_rows, self.world_size))

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        if checkpoint is not None:
            place = self._job.checkpoints / f"checkpoint_{int(numbers['step']):08d}"
            shutil.copytree(checkpoint, place, dirs_exist_ok=True)
        dist.barrier()

    def node_is_leaving(self) -> bool:
        return False


class RunReporter:
    """Writes metrics on rank 0, and hands them and checkpoints to the site."""

    def __init__(self, job: TrainingJob, site: Site, engine: Any, objective: Objective, log: MetricsLog | None) -> None:
        self._job, self._site, self._engine, self._objective, self._log = job, site, engine, objective, log

    def log(self, progress: Progress, metrics: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(progress.step, metrics)

    def report(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None:
        if self._log is not None and metrics:
            self._log.write(progress.step, metrics)
        # Ray keeps the checkpoint with the highest `best`: that of the newest best evaluation.
        best = progress.step if progress.best_step == progress.step else 0
        numbers = {"step": progress.step, "best": best, **metrics}
        if not save:
            self._site.report(numbers, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {"progress": progress.state_dict(), "objective": self._objective.state_dict()}
            ds.save(self._engine, Path(folder), state)
            self._site.report(numbers, Path(folder))

    def last_checkpoint(self) -> str:
        newest = ds.newest_checkpoint(self._job.checkpoints)
        return (
            f"The last good checkpoint is step {newest[0]}'s, {newest[1]}" if newest else "No checkpoint was saved yet"
        )


# Seconds between two looks at whether a node is leaving: all ranks wait for each other there.
PREEMPTION_POLL_S = 5.0


class Noticeboard:
    """What all ranks hear after a step: the gravest that any of them knows of."""

    def __init__(self, job: TrainingJob, site: Site, device: torch.device) -> None:
        self._job, self._site, self._device = job, site, device
        self._next_poll, self._saved_for_preemption = time.monotonic(), False

    def __call__(self) -> Notice:
        own = Notice.NONE
        if self._job.deadline is not None and time.time() >= self._job.deadline:
            own = Notice.OUT_OF_TIME
        if self._job.told_to_stop():
            own = Notice.TERMINATED
        # A trial of Tune saves nothing: its reports all have to hold the objective.
        polls = self._job.export and self._site.rank == 0 and time.monotonic() >= self._next_poll
        heard, anyone_polls = ds.max_over_ranks([own, polls], self._device)
        if anyone_polls:
            self._next_poll = time.monotonic() + PREEMPTION_POLL_S
            if self._site.node_is_leaving() and not self._saved_for_preemption:
                self._saved_for_preemption = True
                heard = max(heard, Notice.SAVE)
        return Notice(int(heard))


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int  # whose weights are the result
    notice: Notice = Notice.NONE  # to leave, where it heard one before its end
    failure: str = ""  # why it cannot go on

    def evaluation(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of that step's evaluation."""
        return next(line for line in metrics if line["step"] == self.step and "eval_loss" in line)


def train_rank(job: TrainingJob, site: Site) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end, and exports the model."""
    torch.set_num_threads(num_threads(job.config.cluster))
    plan = Plan(job.plan(site.world_size))
    held_out_plan = Plan(job.plan(site.world_size, split="validation"))
    bound = max(plan.max_response_tokens, held_out_plan.max_response_tokens)
    newest = ds.agreed_checkpoint(job.checkpoints)
    engine = _start(job, bound, plan.total_steps, newest)
    progress, notice = _train(job, site, engine, plan, held_out_plan, newest)
    if notice > Notice.NONE:
        return Outcome(progress.step, notice)
    best = progress.best_step or progress.step
    if job.export:
        if best != progress.step:
            # DeepSpeed does not load into an engine that has trained; two at a time might not fit.
            engine.destroy()
            del engine
            ds.collect_garbage()
            engine = _from_step(job, best, bound, plan.total_steps)
        _export(job, engine)
    return Outcome(best)


def _train(
    job: TrainingJob, site: Site, engine: Any, plan: Plan, held_out: Plan, checkpoint: Path | None
) -> tuple[Progress, Notice]:
    """Restores the checkpoint, if there is one, and trains from there; how far it came, and the notice to leave."""
    # Before the checkpoint restores the random state, which measuring draws from.
    machine_flops = ds.sum_over_ranks(peak_flops(DTYPES[job.config.model.dtype], engine.device), engine.device)
    objective, progress = job.task.objective(job.config), Progress()
    if checkpoint is not None:
        state = ds.load(engine, checkpoint)
        progress = Progress(**state["progress"])
        objective.load_state_dict(state["objective"])
    if progress.step == plan.total_steps or progress.ran_out_of_patience(job.settings):
        return progress, Notice.NONE
    log = MetricsLog(job.metrics, progress.step) if site.rank == 0 else None
    notice = fit(
        engine,
        objective,
        _own_batches(job, site, progress.step),
        job.settings,
        progress=progress,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        evaluate=lambda: evaluate(engine, objective, _held_out(job, held_out, site), engine.device),
        reporter=RunReporter(job, site, engine, objective, log),
        notice=Noticeboard(job, site, engine.device),
        flops=ModelFlops(engine.module.model),
        machine_flops=machine_flops,
    )
    if log is not None:
        log.close()
    return progress, notice


def _export(job: TrainingJob, engine: Any) -> None:
    """Writes the trained model as a folder that transformers, and peft for an adapter, loads; all ranks call it."""
    model, folder = engine.module.model, job.output / "model"
    tensors = ds.trained_tensors(engine, model)
    if not job.settings.use_peft:
        save_whole(model, tensors, folder, is_writer=dist.get_rank() == 0)
    elif (adapter := dict(tensors)) and dist.get_rank() == 0:
        fresh = job.task.fresh_base(job.config, job.base)
        if fresh is None:
            model.save_pretrained(str(folder), state_dict=adapter)
        else:
            merged = merge_adapter(model, adapter, fresh)
            save_whole(merged, saved_tensors(merged), folder)
    if dist.get_rank() == 0:
        job.task.tokenizer(job.config, job.base).save_pretrained(folder)
    dist.barrier()


def _start(job: TrainingJob, max_response_tokens: int, total_steps: int, checkpoint: Path | None) -> Any:
    """An engine around the task's module, ready for `ds.load` of the checkpoint: the same weights on all ranks, and
    dropout of each rank its own."""
    dtype = job.config.model.dtype
    torch.manual_seed(job.config.run.seed)
    with ds.sharded_construction(job.settings, dtype=dtype):
        module = job.task.load(job.config, job.base, max_response_tokens)
    torch.manual_seed(job.config.run.seed + dist.get_rank())
    resized = checkpoint is not None and ds.is_resized(checkpoint, job.settings)
    return ds.initialize(module, job.settings, dtype=dtype, total_steps=total_steps, resized=resized)


def _from_step(job: TrainingJob, step: int, max_response_tokens: int, total_steps: int) -> Any:
    """An engine with the weights of an earlier step.

    Raises:
        RuntimeError: there is no whole checkpoint of that step any more.
    """
    checkpoint = ds.agreed_checkpoint(job.checkpoints, step=step)
    if checkpoint is None:
        raise RuntimeError(
            f"the best step was {step}, and {job.checkpoints} has no whole checkpoint of it; "
            "metric_for_best_model: null takes the last step's weights"
        )
    engine = _start(job, max_response_tokens, total_steps, checkpoint)
    ds.load(engine, checkpoint)
    return engine


def _own_batches(job: TrainingJob, site: Site, start_step: int) -> Iterator[MicroBatch]:
    for row in site.rows(start_step):
        if row["step"][0].as_py() >= start_step:
            yield decode_row(row, job)


def _held_out(job: TrainingJob, plan: Plan, site: Site) -> Iterator[MicroBatch]:
    """This rank's share of the validation pairs, filled up so that every rank has equally many micro-batches."""
    return (decode_row(plan.row(i), job) for i in range(site.rank, plan.num_rows, site.world_size))


def decode_row(row: pa.Table, job: TrainingJob) -> MicroBatch:
    """The micro-batch of a row of `Plan.row`."""
    values = {name: row[name][0].as_py() for name in row.column_names}
    columns, responses = job.task.columns, job.task.responses
    names = ("pair_id", TOKEN_COLUMNS[0], *responses, *columns)
    pairs = [dict(zip(names, cells, strict=True)) for cells in zip(*(values[name] for name in names), strict=True)]
    batch = collate(pairs, shared_prefix=job.shared_prefix, column_names=columns, responses=responses)
    scalars = ("step", "pairs_in_step", "response_tokens_in_step", "last_of_step")
    return dataclasses.replace(batch, **{name: values[name] for name in scalars})
