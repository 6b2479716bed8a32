"""The one training loop, for policy, reward model and SFT. It knows no loss, no Ray and no file.

Legend: B pairs of a micro-batch.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from madpo_ray.config import TrainingConfig
from madpo_ray.data.batching import MicroBatch
from madpo_ray.models.flops import peak_memory_bytes
from madpo_ray.training.collectives import gather_objects
from madpo_ray.training.metrics import Meter, Metric
from madpo_ray.training.protocols import (
    Engine,
    NonFiniteError,
    Notice,
    Objective,
    Reporter,
)
from madpo_ray.training.schedule import Progress, Schedule

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """Everything that the loop works with on one rank."""

    engine: Engine
    objective: Objective
    settings: TrainingConfig
    schedule: Schedule
    progress: Progress
    reporter: Reporter
    notice: Callable[[], Notice]  # asked after each step; the same answer on every rank
    measure_validation: Callable[[], dict[str, float]]
    flops: Callable[[MicroBatch], float]  # of one forward and backward
    machine_flops: float  # peak FLOP/s of all ranks


def fit(run: TrainingRun, batches: Iterable[MicroBatch]) -> Notice:
    """Trains on this rank's batches, in order, to the end of the schedule.

    Returns:
        NONE at the end of the schedule or of the patience, else the notice that ended it early.

    Raises:
        NonFiniteError: a loss or gradient is not finite, more often than `skip_nonfinite` allows.
            The optimizer has not moved.
        RuntimeError: the batches end early.
    """
    run.engine.train()  # transformers loads in eval mode: no dropout, no checkpointing
    remaining = iter(batches)
    log = _RunningLog(run)
    while True:
        # One optimizer step, and what it makes due.
        step = train_step(run, _micro_batches_of_step(remaining))
        log.add(step)
        notice = run.notice()
        due = run.schedule.due(run.progress.step, save_requested=notice > Notice.NONE)

        if due.log:
            run.reporter.log(run.progress, log.take())

        # Evaluations and saves do not count as training time.
        with log.paused():
            measured = run.measure_validation() if due.evaluate else {}
            if due.evaluate:
                run.progress.judge(measured, run.settings)
            if due.evaluate or due.save:
                run.reporter.publish(run.progress, measured, save=due.save)

        # The end: asked for, reached, or out of patience.
        if notice > Notice.SAVE and not due.is_last:
            return notice
        if due.is_last or run.progress.ran_out_of_patience(run.settings):
            return Notice.NONE


class StepResult(NamedTuple):
    """The result of one optimizer step."""

    learning_rate: float
    grad_norm: float | None  # None if it was skipped
    meter: Meter


def train_step(run: TrainingRun, micro_batches: Iterable[MicroBatch]) -> StepResult:
    """Forward and backward of this rank's micro-batches, then one optimizer step."""
    progress = run.progress
    objective_state = run.objective.state_dict()
    meter = Meter()
    step_loss = torch.zeros((), device=run.engine.device)
    pair_ids: list[str] = []

    # Add up the gradients of this rank's micro-batches.
    is_complete = False
    for batch in micro_batches:
        if batch.place.step != progress.step:
            raise RuntimeError(f"got pairs of step {batch.place.step} at step {progress.step}")
        batch = batch.to(run.engine.device)
        pair_ids += batch.pair_ids
        _forward_backward(run, batch, meter, step_loss)
        is_complete = batch.place.is_last
    if not is_complete:
        total = run.schedule.total_steps
        raise RuntimeError(f"the data ended at step {progress.step} of {total}")

    # Move the weights, unless the gradient is not finite.
    learning_rate = run.engine.learning_rate()
    grad_norm = run.engine.step()
    progress.step += 1
    if math.isfinite(grad_norm):
        run.objective.end_step()
        return StepResult(learning_rate, grad_norm, meter)

    progress.skipped += 1
    _skip_or_fail(run, grad_norm, step_loss, pair_ids)
    run.objective.load_state_dict(objective_state)
    return StepResult(learning_rate, None, Meter())


def _micro_batches_of_step(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The next batches up to the last one of a step."""
    for batch in batches:
        yield batch
        if batch.place.is_last:
            return


def _forward_backward(run: TrainingRun, batch: MicroBatch, meter: Meter, step_loss: Tensor) -> None:
    """Adds one micro-batch to the step's gradient, loss and metrics."""
    terms = run.objective(run.engine(batch), batch, training=True)
    if terms.loss.shape != batch.valid.shape:
        shape = tuple(terms.loss.shape)
        raise RuntimeError(f"a loss of shape {shape} for {len(batch.valid)} pairs")

    # This micro-batch's part of the step's mean over pairs.
    loss = (terms.loss * batch.valid).sum() / batch.place.pairs_in_step
    step_loss += loss.detach()
    run.engine.backward(_poisoned_if_not_finite(loss, step_loss), is_last=batch.place.is_last)

    # Its metrics stay on the device until the next log.
    metrics = {
        "loss": Metric(terms.loss),
        **terms.metrics,
        "num_tokens": _total(batch.num_real_tokens, batch),
        "flops": _total(run.flops(batch), batch),
        "peak_memory_bytes": Metric(_constant(peak_memory_bytes(), batch), "max"),
    }
    meter.add(metrics, batch.valid)


def _poisoned_if_not_finite(loss: Tensor, step_loss: Tensor) -> Tensor:
    """`loss` times 1, or NaN if the step's loss is not finite.

    The gradient, and with it the norm that every rank sees, is then not finite either, and the host
    does not have to wait for the loss to be read.
    """
    return loss * (1 + 0 * step_loss)


def _constant(value: float, batch: MicroBatch) -> Tensor:
    return torch.full_like(batch.valid, value, dtype=torch.float64)


def _total(value: float, batch: MicroBatch) -> Metric:
    """A number of the complete micro-batch, spread over its pairs."""
    return Metric(_constant(value, batch) / len(batch.valid), "sum")


def _skip_or_fail(
    run: TrainingRun, grad_norm: float, step_loss: Tensor, pair_ids: list[str]
) -> None:
    """Warns of a skipped step. Raises NonFiniteError, on every rank, after too many of them."""
    # What happened, with the pairs of all ranks.
    step = run.progress.step
    ranks = gather_objects((float(step_loss), pair_ids))
    loss = sum(share for share, _ in ranks)
    all_ids = [pair_id for _, ids in ranks for pair_id in ids]

    what = f"gradient norm of step {step} is {grad_norm}"
    if not math.isfinite(loss):
        what = f"loss of step {step} is {loss}"
    message = f"the {what}; the optimizer has not moved. Pairs of the step: {', '.join(all_ids)}"

    # Whether the run may continue.
    allowed = run.settings.skip_nonfinite
    if run.progress.skipped > allowed:
        raise NonFiniteError(
            f"{message}. {run.reporter.last_checkpoint()}. skip_nonfinite: {allowed} such steps "
            "are skipped before a run fails"
        )
    logger.warning(
        "%s. The step is skipped (%d of skip_nonfinite: %d)",
        message,
        run.progress.skipped,
        allowed,
    )


class _RunningLog:
    """The metrics since the last log, and the time that went into them."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._meter = Meter()
        self._last_step: StepResult | None = None
        self._since = time.monotonic()

    def add(self, step: StepResult) -> None:
        self._meter.merge(step.meter)
        self._last_step = step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count as training."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def take(self) -> dict[str, float]:
        """The metrics of all ranks since the last call. A collective."""
        run = self._run
        step = self._last_step
        assert step is not None
        now = time.monotonic()
        elapsed_s = now - self._since
        self._since = now

        metrics = _with_rates(run, self._meter.reduce(), elapsed_s) if self._meter else {}
        metrics["learning_rate"] = step.learning_rate
        metrics["epoch"] = run.progress.step / run.schedule.steps_per_epoch
        if run.progress.skipped:
            metrics["skipped_steps"] = run.progress.skipped
        if step.grad_norm is not None:
            metrics["grad_norm"] = step.grad_norm
        return metrics


def _with_rates(run: TrainingRun, metrics: dict[str, float], elapsed_s: float) -> dict[str, float]:
    """The metrics with totals turned into rates; counts the tokens in the run's progress."""
    pairs = metrics.pop("pairs")
    tokens = metrics.pop("num_tokens")
    flops = metrics.pop("flops")
    run.progress.num_tokens += round(tokens)
    return metrics | {
        "num_tokens": run.progress.num_tokens,
        "tokens_per_second": tokens / elapsed_s,
        "pairs_per_second": pairs / elapsed_s,
        "mfu": flops / elapsed_s / run.machine_flops,
    }


@torch.no_grad()
def measure_validation(
    engine: Engine, objective: Objective, batches: Iterable[MicroBatch]
) -> dict[str, float]:
    """`eval_` metrics over every pair of `batches` (this rank's), reduced over ranks.

    All ranks need equally many batches.
    """
    engine.eval()
    meter = Meter()
    for batch in batches:
        batch = batch.to(engine.device)
        terms = objective(engine(batch), batch, training=False)
        meter.add({"loss": Metric(terms.loss), **terms.metrics}, batch.valid)
    engine.train()

    metrics = meter.reduce()
    del metrics["pairs"]
    return {f"eval_{name}": value for name, value in metrics.items()}
