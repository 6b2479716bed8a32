"""Outcomes of trials: the best of them, a table of all, and which keys matter."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna

from madpo_ray.config import SEED, Domain
from madpo_ray.evaluation.comparisons import on_frontier
from madpo_ray.search.sampler import distributions_of

Mode = Literal["min", "max"]

ACCURACY = "eval_rewards/accuracies"
EVALUATION = "evaluation"  # how many a trial has reported; ASHA's time
TOTAL_STEPS = "total_steps"

# What each tune.objective compares; the first metric decides which trial is best.
OBJECTIVES: dict[str, tuple[tuple[str, Mode], ...]] = {
    "accuracy": ((ACCURACY, "max"),),
    "reward": (("reward", "max"),),
    "reward_and_kl": (("reward", "max"), ("kl", "min")),
}

# Fewer complete trials say nothing about which key matters.
MIN_TRIALS_FOR_IMPORTANCE = 8


@dataclass(frozen=True)
class Outcome:
    """A trial: what it was given, and its last numbers."""

    values: dict[str, Any]  # by dotted key
    evaluation: int  # how many it has reported
    metrics: dict[str, Any]
    seconds: float | None  # of its last training
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it trained to its end: not stopped, and without an error."""
        steps = self.metrics.get("step")
        return self.error is None and steps is not None and steps >= self.metrics[TOTAL_STEPS]

    @property
    def state(self) -> str:
        if self.error is not None:
            return "failed"
        return "complete" if self.is_complete else "stopped"

    @property
    def settings(self) -> dict[str, Any]:
        """Its values without the seed."""
        return {key: value for key, value in self.values.items() if key != SEED}


def best_outcome(outcomes: Sequence[Outcome], objective: str) -> Outcome:
    """A trial of the settings that are best: by the mean over their seeds, of equals the first.

    Trials that were stopped count only if none is complete.

    Raises:
        RuntimeError: no trial was evaluated.
    """
    metric, mode = OBJECTIVES[objective][0]
    candidates = [one for one in outcomes if one.error is None and metric in one.metrics]
    candidates = [one for one in candidates if one.is_complete] or candidates
    if not candidates:
        raise RuntimeError("no trial was evaluated")
    sign = 1 if mode == "max" else -1

    def rank(one: Outcome) -> float:
        same = [other for other in candidates if other.settings == one.settings]
        return sign * float(np.mean([other.metrics[metric] for other in same]))

    return max(candidates, key=rank)


def table_of(outcomes: Sequence[Outcome], objective: str) -> list[dict[str, Any]]:
    """One dict per trial; with two objectives, whether it is on their Pareto frontier."""
    metrics = OBJECTIVES[objective]
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(outcomes, start=1):
        row = {"trial": number, "state": one.state, **one.values, **one.metrics}
        rows.append(row | {"seconds": one.seconds, "error": one.error})
    if len(metrics) > 1:
        (gain, _), (cost, _) = metrics
        complete = [row for row in rows if row["state"] == "complete"]
        costs = [row[cost] for row in complete]
        gains = [row[gain] for row in complete]
        for row, is_best in zip(complete, on_frontier(costs, gains), strict=True):
            row["on_frontier"] = is_best
    return rows


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per trial."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)


def importances(
    outcomes: Sequence[Outcome], space: Mapping[str, Domain], objective: str
) -> dict[str, float]:
    """How much of the objective's spread each key accounts for, over complete trials; in sum 1.

    Functional ANOVA (Hutter et al. 2014), as Optuna computes it. Empty for too few trials, and if
    the objective is the same for all.
    """
    metric, mode = OBJECTIVES[objective][0]
    complete = [one for one in outcomes if one.is_complete and metric in one.metrics]
    values = [one.metrics[metric] for one in complete]
    if len(complete) < MIN_TRIALS_FOR_IMPORTANCE or np.ptp(values) == 0:
        return {}
    distributions = distributions_of(space)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    for one, value in zip(complete, values, strict=True):
        params = {key: one.values[key] for key in distributions}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items()}


def shown(values: Mapping[str, Any]) -> str:
    """Values for one line, without the section's name."""
    parts = []
    for key, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.removeprefix('train.')} {text}")
    return ", ".join(parts)
