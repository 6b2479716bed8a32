"""The one training loop, for reward model and policy alike. It knows no loss by name, and neither Ray nor files."""

import enum
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from madpo_ray import engine as ds
from madpo_ray.batching import MicroBatch
from madpo_ray.config import TrainingConfig
from madpo_ray.metrics import Meter, with_effective_sample_size
from madpo_ray.throughput import peak_memory_bytes

logger = logging.getLogger(__name__)


class Terms(NamedTuple):
    """What an objective makes of a micro-batch: the loss of each pair (B,) and metrics of each pair, name -> (B,)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A loss with its metrics. `training` is False in evaluation, where running statistics stay as they are."""

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms: ...

    def end_step(self) -> None:
        """Called once after each optimizer step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """The part of an Objective that carries nothing from step to step."""

    def end_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, "a checkpoint of another objective"


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; names the step, its pairs on all ranks and the last good checkpoint."""


class Notice(enum.IntEnum):
    """What a rank may hear between two steps; the gravest of all ranks' counts for all."""

    NONE = 0
    SAVE = 1  # a node is about to go: save, and go on
    OUT_OF_TIME = 2  # save, and leave
    TERMINATED = 3  # save, and leave


@dataclass
class Progress:
    """How far a run is; saved whole in every checkpoint."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # read so far by all ranks, without padding
    skipped: int = 0  # steps left out because their loss or gradient was not finite
    best_metric: float | None = None  # of the evaluations so far, where the settings name a metric
    best_step: int = 0
    evaluations_since_best: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def judge(self, metrics: Mapping[str, float], settings: TrainingConfig) -> bool:
        """Takes an evaluation in; says whether it is the best so far."""
        if settings.metric_for_best_model is None:
            return False
        name, greater = settings.best_metric
        value, best = metrics[name], self.best_metric
        better = math.isfinite(value) and (best is None or (value > best if greater else value < best))
        self.evaluations_since_best = 0 if better else self.evaluations_since_best + 1
        if better:
            self.best_metric, self.best_step = value, self.step
        return better

    def ran_out_of_patience(self, settings: TrainingConfig) -> bool:
        patience = settings.early_stopping_patience
        return patience is not None and self.evaluations_since_best >= patience


class Reporter(Protocol):
    """Where a run's numbers and checkpoints go."""

    def log(self, progress: Progress, metrics: dict[str, float]) -> None: ...

    def report(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None: ...

    def last_checkpoint(self) -> str:
        """Where the newest one lies, in words."""


def fit(
    engine: Any,
    objective: Objective,
    batches: Iterable[MicroBatch],
    settings: TrainingConfig,
    *,
    progress: Progress,
    total_steps: int,
    steps_per_epoch: int,
    evaluate: Callable[[], dict[str, float]],
    reporter: Reporter,
    notice: Callable[[], Notice],
    flops: Callable[[MicroBatch], float],
    machine_flops: float,
) -> Notice:
    """Trains over `batches` (this rank's, in order) until `total_steps`, evaluating, logging and saving on the way.

    `notice` is asked after each step and gives every rank the same answer. `flops` of a micro-batch and
    `machine_flops` (the peak FLOP/s of all ranks) give the model FLOP utilisation, `mfu`.

    Returns:
        The notice to leave that ended it before its time; NONE where it came to its end, or patience ran out.

    Raises:
        NonFiniteError: a loss or gradient is not finite, more often than `skip_nonfinite` allows; the optimizer has
            not moved.
        RuntimeError: the batches end early.
    """
    engine.train()  # transformers loads in eval mode, where activation checkpointing and dropout do nothing
    meter, step_meter, clock = Meter(), Meter(), time.monotonic()
    step_loss, step_ids = torch.zeros((), device=engine.device), list[str]()
    before = objective.state_dict()  # of the step
    for batch in batches:
        assert batch.step == progress.step, f"a batch of step {batch.step} at step {progress.step}"
        batch = batch.to(engine.device)
        step_ids += batch.pair_ids
        _forward_backward(engine, objective, batch, step_meter, step_loss, flops(batch))
        if not batch.last_of_step:
            continue
        rate = ds.learning_rate(engine)
        grad_norm = ds.step(engine)
        progress.step += 1
        if math.isfinite(grad_norm):
            objective.end_step()
            meter.merge(step_meter)
        else:
            progress.skipped += 1
            _refuse_or_skip(progress, settings, grad_norm, step_loss, step_ids, reporter)
            objective.load_state_dict(before)
        before = objective.state_dict()
        step_meter = Meter()
        step_loss.zero_()
        step_ids.clear()

        heard = notice()
        done = progress.step == total_steps
        evaluates = done or _due(progress.step, settings.eval_steps)
        saves = done or heard > Notice.NONE or _due(progress.step, settings.save_steps)
        saves = saves or (evaluates and settings.metric_for_best_model is not None)
        # A checkpoint holds no half-filled meter, so a run that is resumed from a save of its own plan logs what an
        # undisturbed one does.
        if saves or _due(progress.step, settings.logging_steps):
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            metrics = {"learning_rate": rate, "epoch": progress.step / steps_per_epoch}
            if progress.skipped:
                metrics["skipped_steps"] = progress.skipped
            if math.isfinite(grad_norm):
                metrics["grad_norm"] = grad_norm
            if meter:
                metrics = _logged(meter.reduce(), progress, elapsed, machine_flops) | metrics
            reporter.log(progress, metrics)
        if evaluates or saves:
            paused = time.monotonic()
            measured = evaluate() if evaluates else {}
            if evaluates:
                progress.judge(measured, settings)
            reporter.report(progress, measured, save=saves)
            clock += time.monotonic() - paused
        if heard > Notice.SAVE and not done:
            return heard
        if done or progress.ran_out_of_patience(settings):
            return Notice.NONE
    raise RuntimeError(f"the data ended at step {progress.step} of {total_steps}")


def _refuse_or_skip(
    progress: Progress,
    settings: TrainingConfig,
    grad_norm: float,
    step_loss: Tensor,
    pair_ids: list[str],
    reporter: Reporter,
) -> None:
    """Raises NonFiniteError, the same on every rank, unless the settings let the step be left out."""
    ranks = ds.gather_objects((float(step_loss), pair_ids))
    loss = sum(share for share, _ in ranks)
    what = f"gradient's norm of step {progress.step} is {grad_norm}"
    if not math.isfinite(loss):
        what = f"loss of step {progress.step} is {loss}"
    message = (
        f"the {what}; the optimizer has not moved. Pairs of the step: {', '.join(i for _, ids in ranks for i in ids)}"
    )
    if progress.skipped > settings.skip_nonfinite:
        raise NonFiniteError(
            f"{message}. {reporter.last_checkpoint()}. skip_nonfinite: {settings.skip_nonfinite} such steps are left "
            "out before a run stops"
        )
    logger.warning("%s. It is left out (%d of skip_nonfinite: %d)", message, progress.skipped, settings.skip_nonfinite)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _forward_backward(
    engine: Any, objective: Objective, batch: MicroBatch, meter: Meter, step_loss: Tensor, flops: float
) -> None:
    """Adds one micro-batch to the step's gradient, and its share of the step's loss to `step_loss`."""
    engine.set_gradient_accumulation_boundary(batch.last_of_step)
    terms = objective(engine(batch), batch, training=True)
    assert terms.loss.shape == batch.valid.shape, f"a loss of {tuple(terms.loss.shape)} for {len(batch.valid)} pairs"
    loss = (terms.loss * batch.valid).sum() / batch.pairs_in_step
    step_loss += loss.detach()
    # Times 1, or NaN where the step's loss is not finite: the gradient, and with it the norm that every rank sees, is
    # then not finite either, and nothing has to wait for the loss to be read.
    ds.backward(engine, loss * (1 + 0 * step_loss))
    totals = {"num_tokens": batch.num_real_tokens, "padded_tokens": batch.padded_tokens, "flops": flops}
    spread = {name: _spread(total, batch) for name, total in totals.items()}
    peak = torch.full_like(batch.valid, peak_memory_bytes(), dtype=torch.float64)
    meter.add({"loss": terms.loss, **terms.metrics, **spread, "peak_memory_bytes": peak}, batch.valid)


def _spread(total: float, batch: MicroBatch) -> Tensor:
    """A number of the whole micro-batch as a per-pair value, so that the pair-weighted mean keeps its sum."""
    return torch.full_like(batch.valid, total, dtype=torch.float64) / len(batch.valid)


def _logged(reduced: dict[str, float], progress: Progress, elapsed: float, machine_flops: float) -> dict[str, float]:
    pairs = reduced.pop("pairs")
    tokens, padded, flops = (reduced.pop(name) * pairs for name in ("num_tokens", "padded_tokens", "flops"))
    progress.num_tokens += round(tokens)
    return with_effective_sample_size(reduced) | {
        "num_tokens": progress.num_tokens,
        "padding_fraction": 1 - tokens / padded,
        "tokens_per_second": tokens / elapsed,
        "pairs_per_second": pairs / elapsed,
        "mfu": flops / elapsed / machine_flops,
    }


@torch.no_grad()
def evaluate(
    module: nn.Module, objective: Objective, batches: Iterable[MicroBatch], device: torch.device
) -> dict[str, float]:
    """`eval_` metrics over every pair of `batches` (this rank's), reduced over ranks. All ranks need equally many
    batches."""
    module.eval()
    meter = Meter()
    for batch in batches:
        batch = batch.to(device)
        terms = objective(module(batch), batch, training=False)
        meter.add({"loss": terms.loss, **terms.metrics}, batch.valid)
    module.train()
    reduced = meter.reduce()
    del reduced["pairs"]
    return {f"eval_{name}": value for name, value in with_effective_sample_size(reduced).items()}
