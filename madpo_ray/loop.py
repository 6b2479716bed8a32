"""The one training loop, for reward model and policy alike. It knows no loss by name, and neither Ray nor files."""

import logging
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


@dataclass
class Progress:
    """How far a run is; saved whole in every checkpoint."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # read so far by all ranks, without padding

    def state_dict(self) -> dict[str, int]:
        return asdict(self)


class Reporter(Protocol):
    """Where a run's numbers and checkpoints go."""

    def log(self, progress: Progress, metrics: dict[str, float]) -> None: ...

    def report(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None: ...


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
    flops: Callable[[MicroBatch], float],
    peak_flops: float,
) -> None:
    """Trains over `batches` (this rank's, in order) until `total_steps`, evaluating, logging and saving on the way.

    `flops` of a micro-batch and `peak_flops` (FLOP/s of one rank) give the model FLOP utilisation, `mfu`.

    Raises:
        RuntimeError: a loss is not finite, or the batches end early.
    """
    meter, clock = Meter(), time.monotonic()
    step_loss = torch.zeros((), device=engine.device)
    for batch in batches:
        batch = batch.to(engine.device)
        step_loss += _forward_backward(engine, objective, batch, meter, flops(batch))
        if not batch.last_of_step:
            continue
        if not torch.isfinite(step_loss):
            raise RuntimeError(f"the loss of step {progress.step + 1} is {step_loss.item()}: pairs {batch.pair_ids}")
        rate = ds.learning_rate(engine)
        grad_norm = ds.step(engine)
        objective.end_step()
        progress.step += 1
        step_loss.zero_()

        done = progress.step == total_steps
        if done or progress.step % settings.logging_steps == 0:
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            metrics = _logged(meter.reduce(), progress, elapsed, peak_flops)
            metrics |= {"grad_norm": grad_norm, "learning_rate": rate, "epoch": progress.step / steps_per_epoch}
            reporter.log(progress, metrics)
        evaluates = done or _due(progress.step, settings.eval_steps)
        saves = done or _due(progress.step, settings.save_steps)
        if evaluates or saves:
            reporter.report(progress, evaluate() if evaluates else {}, save=saves)
            clock = time.monotonic()
        if done:
            return
    if progress.step < total_steps:
        raise RuntimeError(f"the data ended at step {progress.step} of {total_steps}")


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _forward_backward(engine: Any, objective: Objective, batch: MicroBatch, meter: Meter, flops: float) -> Tensor:
    """Adds one micro-batch to the step's gradient; returns its share of the step's loss."""
    engine.set_gradient_accumulation_boundary(batch.last_of_step)
    terms = objective(engine(batch), batch, training=True)
    assert terms.loss.shape == batch.valid.shape, f"a loss of {tuple(terms.loss.shape)} for {len(batch.valid)} pairs"
    loss = (terms.loss * batch.valid).sum() / batch.pairs_in_step
    ds.backward(engine, loss)
    totals = {"num_tokens": batch.num_real_tokens, "padded_tokens": batch.num_tokens, "flops": flops}
    spread = {name: _spread(total, batch) for name, total in totals.items()}
    meter.add({"loss": terms.loss, **terms.metrics, **spread}, batch.valid)
    return loss.detach()


def _spread(total: float, batch: MicroBatch) -> Tensor:
    """A number of the whole micro-batch as a per-pair value, so that the pair-weighted mean keeps its sum."""
    return torch.full_like(batch.valid, total, dtype=torch.float64) / len(batch.valid)


def _logged(reduced: dict[str, float], progress: Progress, elapsed: float, peak_flops: float) -> dict[str, float]:
    pairs = reduced.pop("pairs")
    tokens, padded, flops = (reduced.pop(name) * pairs for name in ("num_tokens", "padded_tokens", "flops"))
    progress.num_tokens += round(tokens)
    return with_effective_sample_size(reduced) | {
        "num_tokens": progress.num_tokens,
        "padding_fraction": 1 - tokens / padded,
        "tokens_per_second": tokens / elapsed,
        "pairs_per_second": pairs / elapsed,
        "mfu": flops / elapsed / (peak_flops * ds.world_size()),
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
