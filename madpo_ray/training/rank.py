"""What every rank of a training does: load, restore, fit, export. Knows no Ray; a Site does."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from madpo_ray.artifacts.manifest import model_folder
from madpo_ray.data.batching import MicroBatch, collate
from madpo_ray.data.micro_batches import NUMBER, MicroBatchReader, decode_micro_batch
from madpo_ray.data.order import Order
from madpo_ray.errors import UserError
from madpo_ray.models.devices import use_device
from madpo_ray.models.flops import ModelFlops, peak_flops
from madpo_ray.models.loading import DTYPES
from madpo_ray.models.reading import Reading, find_reading, require_no_dropout
from madpo_ray.models.saving import merge_adapter, save_model, saved_tensors
from madpo_ray.prefetch import prefetched
from madpo_ray.training.checkpoints import (
    agreed_checkpoint,
    check_space,
    is_resized,
    load_checkpoint,
    prune_checkpoints,
)
from madpo_ray.training.collectives import broadcast_object, gather_objects, sum_over_ranks
from madpo_ray.training.engine import DeepSpeedEngine, sharded_construction
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.loop import TrainingRun, fit, measure_validation
from madpo_ray.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from madpo_ray.training.protocols import Notice, Site
from madpo_ray.training.reporting import Noticeboard, RunReporter
from madpo_ray.training.schedule import Progress, Schedule


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int  # whose weights are the result
    notice: Notice = Notice.NONE  # to exit, if it got one before its end
    note: str = ""  # what a user may want to know of how it ran

    def evaluation(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of that step's evaluation. Raises RuntimeError if it was lost."""
        line = evaluation_of(metrics, self.step)
        if line is None:
            raise RuntimeError(f"the metrics have no evaluation of step {self.step}")
        return line


def evaluation_of(metrics: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The line of a step's evaluation; None if there is none."""
    lines = (line for line in metrics if line["step"] == step and "eval_loss" in line)
    return next(lines, None)


def run_rank(job: TrainingJob, site: Site) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end, and exports the model."""
    torch.set_num_threads(job.num_threads)
    use_device()
    rank = _Rank(job, site)
    checkpoint = agreed_checkpoint(job.checkpoints)
    engine = rank.start_engine(checkpoint)
    progress, notice = rank.train(engine, checkpoint)
    note = rank.describe(engine)
    if notice > Notice.NONE:
        return Outcome(progress.step, notice, note=note)

    result_step = progress.best_step or progress.step
    if job.export:
        if result_step != progress.step:
            # DeepSpeed does not load into an engine that has trained, and two might not fit.
            engine.close()
            engine = rank.engine_at(result_step)
        _export(job, engine)
        rank.restore_evaluation(engine, result_step, progress.step)
    return Outcome(result_step, note=note)


class _Rank:
    """A job at a site, with the order of its pairs."""

    def __init__(self, job: TrainingJob, site: Site) -> None:
        self._job = job
        self._site = site
        self._order = Order(job.order_spec(site.world_size))
        self._validation_order = Order(job.validation_order_spec(site.world_size))
        self._check_agreement()
        self.reading = Reading(packed=False)  # until an engine is started
        self._validation_reader: MicroBatchReader | None = None
        self._num_unscored = 0
        self._collate = functools.partial(
            collate, column_names=job.task.columns, responses=job.task.responses
        )

    def _check_agreement(self) -> None:
        """Raises RuntimeError if ranks see different rows: some file systems show old listings."""
        orders = (self._order, self._validation_order)
        counts = gather_objects([(o.total_steps, o.num_micro_batches) for o in orders])
        if any(count != counts[0] for count in counts):
            raise RuntimeError(f"ranks see different rows in {self._job.rows}: {counts}")

    def start_engine(self, checkpoint: Path | None) -> DeepSpeedEngine:
        """An engine around the task's module, ready to load the checkpoint.

        All ranks have the same weights, and each its own dropout.

        Raises:
            UserError: the model's numbers are not those of its own forward, whichever way the pairs
                are read, or only in a way that exceeds max_tokens_per_device.
        """
        job = self._job
        orders = (self._order, self._validation_order)
        max_response_tokens = max(order.max_response_tokens for order in orders)
        torch.manual_seed(job.seed)
        with sharded_construction(job.settings, dtype=job.model.dtype):
            module = job.task.load(job, max_response_tokens)
        torch.manual_seed(job.seed + dist.get_rank())
        engine = DeepSpeedEngine(
            module,
            job.settings,
            dtype=job.model.dtype,
            total_steps=self._order.total_steps,
            resized=is_resized(checkpoint, job.settings.zero_stage),
        )
        self.reading = self._choose_reading(engine)
        return engine

    def _choose_reading(self, engine: DeepSpeedEngine) -> Reading:
        """The fastest way to read pairs that gives the model's own numbers."""
        job = self._job
        reading = find_reading(engine.module, engine.device, job.model)
        if job.settings.disable_dropout:
            require_no_dropout(engine.module, engine.device, reading)
        if job.settings.max_tokens_per_device and reading.packed != job.may_pack():
            raise UserError(
                "max_tokens_per_device was planned for packed rows, and this model reads a row "
                "per response: set model.packed_rows: off"
            )
        return reading

    def engine_at(self, step: int) -> DeepSpeedEngine:
        """An engine with the weights of an earlier step.

        Raises:
            RuntimeError: there is no complete checkpoint of that step any more.
        """
        checkpoint = agreed_checkpoint(self._job.checkpoints, step=step)
        if checkpoint is None:
            raise RuntimeError(
                f"the best step was {step}, and {self._job.checkpoints} has no complete "
                "checkpoint of it any more: another start resumes before it"
            )
        engine = self.start_engine(checkpoint)
        load_checkpoint(engine, checkpoint)
        return engine

    def train(self, engine: DeepSpeedEngine, checkpoint: Path | None) -> tuple[Progress, Notice]:
        """Restores the checkpoint, if there is one, and trains from there.

        Returns how far it came, and the notice that ended it early.
        """
        job = self._job
        # Before the checkpoint restores the random state, which measuring draws from.
        own_flops = peak_flops(DTYPES[job.model.dtype], engine.device)
        machine_flops = sum_over_ranks(own_flops, engine.device)

        # Restore.
        objective = job.task.objective(job)
        progress = Progress()
        if checkpoint is not None:
            state = load_checkpoint(engine, checkpoint)
            progress = Progress(**state["progress"])
            objective.load_state_dict(state["objective"])
        if self._site.rank == 0:
            prune_checkpoints(job.checkpoints, progress, limit=job.settings.save_total_limit)
        total_steps = self._order.total_steps
        if progress.step == total_steps or progress.ran_out_of_patience(job.settings):
            return progress, Notice.NONE
        check_space(engine, job.checkpoints)

        # Train.
        log = MetricsLog(job.metrics, progress.step) if self._site.rank == 0 else None
        run = TrainingRun(
            engine=engine,
            objective=objective,
            settings=job.settings,
            schedule=Schedule(job.settings, total_steps, self._order.steps_per_epoch),
            progress=progress,
            reporter=RunReporter(job, self._site, engine, objective, log),
            notice=Noticeboard(job, self._site, engine.device),
            measure_validation=lambda: measure_validation(
                engine, objective, self._validation_batches()
            ),
            flops=ModelFlops(engine.module.model),  # type: ignore[arg-type]
            machine_flops=machine_flops,
        )
        notice = fit(run, self._train_batches(progress.step))
        if log is not None:
            log.close()
        return progress, notice

    def restore_evaluation(self, engine: DeepSpeedEngine, step: int, last_step: int) -> None:
        """Evaluates the engine's weights, of `step`, again if the metrics lost that line."""
        path = self._job.metrics / METRICS_FILE
        is_lost = evaluation_of(read_metrics(path), step) is None if self._site.rank == 0 else None
        if not broadcast_object(is_lost):
            return
        objective = self._job.task.objective(self._job)
        measured = measure_validation(engine, objective, self._validation_batches())
        if self._site.rank == 0:
            log = MetricsLog(self._job.metrics, last_step)
            log.write(step, measured)
            log.close()

    def _train_batches(self, start_step: int) -> Iterator[MicroBatch]:
        order = self._order
        world_size = self._site.world_size
        # A finished run gets the last ones again.
        first = min(order.first_micro_batch(start_step), order.num_micro_batches - world_size)
        numbers = itertools.count(first + self._site.rank, world_size)
        rows = self._site.micro_batches(start_step)
        decoded = itertools.starmap(self._decoded, zip(rows, numbers, strict=False))
        for micro_batch, num_unscored in prefetched(decoded):
            if micro_batch.place.step >= start_step:
                self._num_unscored += num_unscored
                yield micro_batch

    def _validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's share, filled up so that every rank has equally many micro-batches."""
        order = self._validation_order
        if self._validation_reader is None:
            self._validation_reader = MicroBatchReader(order, self._job.complete)
        numbers = range(self._site.rank, order.num_micro_batches, self._site.world_size)
        rows = (self._validation_reader.read([number]) for number in numbers)
        return (batch for batch, _ in prefetched(map(self._decoded, rows, numbers)))

    def _decoded(self, row: pa.Table, number: int) -> tuple[MicroBatch, int]:
        """A micro-batch without the pairs that could not be scored on their way, and how many.

        Raises:
            RuntimeError: the row is not of the micro-batch of this number.
        """
        if row[NUMBER][0].as_py() != number:
            raise RuntimeError(f"micro-batch {row[NUMBER][0]} came instead of {number}")
        pairs, place = decode_micro_batch(row, self._order.spec.token_columns)
        scored = pairs
        if self._job.streamed is not None:
            names = self._job.task.columns
            scored = [pair for pair in pairs if all(math.isfinite(pair[name]) for name in names)]
        micro_batch = self._collate(scored, packed=self.reading.packed, place=place)
        return micro_batch.pinned(), len(pairs) - len(scored)

    def describe(self, engine: DeepSpeedEngine) -> str:
        """What a user may want to know of how it ran. A collective."""
        num_unscored = sum_over_ranks(self._num_unscored, engine.device)
        notes = [self.reading.note] if self.reading.note else []
        if num_unscored:
            notes.append(
                f"not trained on, since they could not be scored: {num_unscored:.0f} pairs"
            )
        return "; ".join(notes)


def _export(job: TrainingJob, engine: DeepSpeedEngine) -> None:
    """Writes the trained model as a folder that transformers, or peft, loads; all ranks call it."""
    model: Any = engine.module.model
    folder = model_folder(job.output)
    is_writer = dist.get_rank() == 0
    tensors = engine.trained_tensors(model)
    if job.settings.use_peft:
        adapter = dict(tensors)  # all ranks gather
        if is_writer:
            _export_adapter(job, model, adapter, folder)
    else:
        save_model(model, tensors, folder, is_writer=is_writer)
    if is_writer:
        job.task.tokenizer(job).save_pretrained(folder)
    dist.barrier()


def _export_adapter(job: TrainingJob, model: Any, adapter: dict[str, Tensor], folder: Path) -> None:
    if not adapter:
        raise RuntimeError("LoRA trained nothing: no adapter weights to export")
    base = job.task.merge_base(job)
    if base is None:
        model.active_peft_config.base_model_name_or_path = job.portable_base
        model.save_pretrained(str(folder), state_dict=adapter)
    else:
        merged = merge_adapter(model, adapter, base)
        save_model(merged, saved_tensors(merged), folder)
