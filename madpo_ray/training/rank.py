"""What every rank of a training does: load, restore, fit, export. Knows no Ray; a Site does."""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from madpo_ray.artifacts.manifest import model_folder
from madpo_ray.artifacts.tables import read_split
from madpo_ray.columns import PAIR_ID, TRAIN
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
from madpo_ray.training import collectives
from madpo_ray.training.checkpoints import (
    agreed_checkpoint,
    check_disk_space,
    is_resized,
    load_checkpoint,
    prune_checkpoints,
)
from madpo_ray.training.engine import DeepSpeedEngine, sharded_construction
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.loop import TrainingRun, fit, measure_validation
from madpo_ray.training.metrics import METRICS_FILE, MetricsLog, evaluation_of, read_metrics
from madpo_ray.training.protocols import Notice, Outcome, Site
from madpo_ray.training.reporting import Noticeboard, RunReporter
from madpo_ray.training.schedule import Progress, Schedule


def run_rank(job: TrainingJob, site: Site) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end, and exports the model."""
    torch.set_num_threads(job.num_threads)
    use_device()
    rank = _Rank(job, site)
    checkpoint = agreed_checkpoint(job.checkpoints)
    engine = rank.start_engine(checkpoint)
    progress, notice = rank.train(engine, checkpoint)
    if notice > Notice.NONE:
        return Outcome(progress.step, notice, note=rank.reading.note)

    note = rank.describe()
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
        self._collate = functools.partial(
            collate, column_names=job.task.columns, responses=job.task.responses
        )

    def _check_agreement(self) -> None:
        """Raises RuntimeError if ranks see different rows: some file systems show old listings."""
        orders = (self._order, self._validation_order)
        counts = collectives.gather_objects([(o.total_steps, o.num_micro_batches) for o in orders])
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
        job, device = self._job, engine.device
        largest = functools.partial(collectives.largest_over_ranks, device=device)
        reading = find_reading(engine.module, device, job.model, largest)
        if job.settings.disable_dropout:
            require_no_dropout(engine.module, device, reading)
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
        machine_flops = collectives.sum_over_ranks(own_flops, engine.device)

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
        check_disk_space(engine, job.checkpoints)

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
        if not collectives.broadcast_object(is_lost):
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
        is_checked = False
        for micro_batch in prefetched(decoded):
            step = micro_batch.place.step
            if not is_checked and step >= max(start_step, order.steps_per_epoch):
                # Before pairs are trained on again. A collective: all ranks come here at this step.
                self.count_unscored()
                is_checked = True
            if step >= start_step:
                yield micro_batch

    def _validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's share, filled up so that every rank has equally many micro-batches."""
        order = self._validation_order
        if self._validation_reader is None:
            self._validation_reader = MicroBatchReader(order, self._job.complete)
        numbers = range(self._site.rank, order.num_micro_batches, self._site.world_size)
        rows = (self._validation_reader.read([number]) for number in numbers)
        return prefetched(map(self._decoded, rows, numbers))

    def _decoded(self, row: pa.Table, number: int) -> MicroBatch:
        """A micro-batch without the pairs that could not be scored on their way.

        Raises:
            RuntimeError: the row is not of the micro-batch of this number.
        """
        if row[NUMBER][0].as_py() != number:
            raise RuntimeError(f"micro-batch {row[NUMBER][0]} came instead of {number}")
        pairs, place = decode_micro_batch(row, self._order.spec.token_columns)
        if self._job.streamed is not None:
            names = self._job.task.columns
            pairs = [pair for pair in pairs if all(math.isfinite(pair[name]) for name in names)]
        return self._collate(pairs, packed=self.reading.packed, place=place).pinned()

    def count_unscored(self) -> int:
        """How many training pairs could not be scored on their way. A collective.

        Raises:
            UserError: more than data.max_reject_fraction allows, on every rank.
        """
        found: int | str | None = None
        if self._site.rank == 0 and self._job.streamed is not None:
            ids = read_split(self._job.rows, TRAIN, [PAIR_ID])[PAIR_ID]
            try:
                found = self._job.streamed.count_failures(ids)
            except UserError as error:
                found = str(error)
        found = collectives.broadcast_object(found)
        if isinstance(found, str):
            raise UserError(found)
        return found or 0

    def describe(self) -> str:
        """What a user may want to know of how it ran. A collective. Raises as above."""
        num_unscored = self.count_unscored()
        notes = [self.reading.note] if self.reading.note else []
        if num_unscored:
            notes.append(f"not trained on, since they could not be scored: {num_unscored} pairs")
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
