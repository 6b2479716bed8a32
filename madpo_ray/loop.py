"""The one training loop, for reward model and policy alike. It knows no loss by name, and neither Ray nor files."""

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
    """A loss or gradient is not finite; names the step and this rank's pairs of it."""


def _not_finite(what: str, value: float, step: int, pair_ids: list[str]) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} of step {step} is {value}; the optimizer has not moved. Pairs of the step: {', '.join(pair_ids)}"
    )


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
    machine_flops: float,
) -> None:
    """Trains over `batches` (this rank's, in order) until `total_steps`, evaluating, logging and saving on the way.

    `flops` of a micro-batch and `machine_flops` (the peak FLOP/s of all ranks) give the model FLOP utilisation, `mfu`.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the optimizer has not moved.
        RuntimeError: the batches end early.
    """
    engine.train()  # transformers loads in eval mode, where activation checkpointing and dropout do nothing
    meter, clock = Meter(), time.monotonic()
    step_loss, step_ids = torch.zeros((), device=engine.device), list[str]()
    for batch in batches:
        assert batch.step == progress.step, f"a batch of step {batch.step} at step {progress.step}"
        batch = batch.to(engine.device)
        step_ids += batch.pair_ids
        step_loss += _forward_backward(engine, objective, batch, meter, flops(batch))
        if not batch.last_of_step:
            continue
        if not torch.isfinite(step_loss):
            raise _not_finite("loss", float(step_loss), progress.step + 1, step_ids)
        rate = ds.learning_rate(engine)
        grad_norm = ds.step(engine)
        if not math.isfinite(grad_norm):
            raise _not_finite("gradient's norm", grad_norm, progress.step + 1, step_ids)
        objective.end_step()
        progress.step += 1
        step_loss.zero_()
        step_ids.clear()

        done = progress.step == total_steps
        saves = done or _due(progress.step, settings.save_steps)
        # A checkpoint holds no half-filled meter, so what a resumed run logs is what an undisturbed one does.
        if saves or _due(progress.step, settings.logging_steps):
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            metrics = _logged(meter.reduce(), progress, elapsed, machine_flops)
            metrics |= {"grad_norm": grad_norm, "learning_rate": rate, "epoch": progress.step / steps_per_epoch}
            reporter.log(progress, metrics)
        evaluates = done or _due(progress.step, settings.eval_steps)
        if evaluates or saves:
            paused = time.monotonic()
            reporter.report(progress, evaluate() if evaluates else {}, save=saves)
            clock += time.monotonic() - paused
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
    totals = {"num_tokens": batch.num_real_tokens, "padded_tokens": batch.padded_tokens, "flops": flops}
    spread = {name: _spread(total, batch) for name, total in totals.items()}
    peak = torch.full_like(batch.valid, peak_memory_bytes(), dtype=torch.float64)
    meter.add({"loss": terms.loss, **terms.metrics, **spread, "peak_memory_bytes": peak}, batch.valid)
    return loss.detach()


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
