"""How far a run is, and what is due after a step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from madpo_ray.config import TrainingConfig


@dataclass
class Progress:
    """How far a run is. Saved in every checkpoint."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # read so far by all ranks, without padding
    skipped: int = 0  # steps skipped because their loss or gradient was not finite
    best_metric: float | None = None  # of the evaluations so far, if the settings name a metric
    best_step: int = 0
    evaluations_since_best: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def judge(self, metrics: Mapping[str, float], settings: TrainingConfig) -> None:
        """Compares an evaluation with the best one so far."""
        if settings.metric_for_best_model is None:
            return
        name, greater_is_better = settings.best_metric
        value = metrics[name]
        best = self.best_metric

        is_better = math.isfinite(value)
        if is_better and best is not None:
            is_better = value > best if greater_is_better else value < best

        if is_better:
            self.best_metric = value
            self.best_step = self.step
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1

    def ran_out_of_patience(self, settings: TrainingConfig) -> bool:
        patience = settings.early_stopping_patience
        return patience is not None and self.evaluations_since_best >= patience


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool
    is_last: bool


@dataclass(frozen=True)
class Schedule:
    """When to log, evaluate, save and end."""

    settings: TrainingConfig
    total_steps: int
    steps_per_epoch: int

    def due(self, step: int, *, save_requested: bool) -> Due:
        """What is due after `step` optimizer steps."""
        settings = self.settings
        is_last = step == self.total_steps
        evaluate = is_last or _is_multiple(step, settings.eval_steps)

        save = is_last or save_requested or _is_multiple(step, settings.save_steps)
        if evaluate and settings.metric_for_best_model is not None:
            save = True

        # A checkpoint holds no half-filled meter, so that a resumed run logs what an undisturbed
        # one does.
        log = save or _is_multiple(step, settings.logging_steps)
        return Due(log=log, evaluate=evaluate, save=save, is_last=is_last)


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def count_turns(num_pairs: int, pairs_per_forward: int, num_workers: int) -> tuple[int, int]:
    """Micro-batches of a step of `num_pairs`, and how many could be read in the same time."""
    num_micro_batches = math.ceil(num_pairs / pairs_per_forward)
    return num_micro_batches, math.ceil(num_micro_batches / num_workers) * num_workers
