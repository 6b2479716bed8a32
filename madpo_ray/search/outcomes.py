"""Outcomes of trials: the best of them, a table of all, and which keys matter."""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna

from madpo_ray.config import SEED, Domain
from madpo_ray.errors import ExitCode, Stopped
from madpo_ray.evaluation.comparisons import on_frontier
from madpo_ray.search.sampler import distributions_of

logger = logging.getLogger(__name__)

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
class TrialOutcome:
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


class Best(NamedTuple):
    """The settings that are best."""

    trial: TrialOutcome  # the first one with them
    mean: float  # of the objective, over the trials with them that count
    standard_error: float | None
    num_seeds: int  # of those trials


def best_settings(outcomes: Sequence[TrialOutcome], objective: str) -> Best:
    """The settings with the best mean over their seeds; of equals the first.

    Settings of which a trial failed or was stopped count only if there are no others: a seed that
    does badly is left out of their mean.

    Raises:
        Stopped: no trial was evaluated.
    """
    metric, mode = OBJECTIVES[objective][0]
    sign = 1 if mode == "max" else -1
    candidates: list[tuple[int, float, Best]] = []
    for same in _by_settings(outcomes):
        evaluated = [trial for trial in same if trial.error is None and metric in trial.metrics]
        complete = [trial for trial in evaluated if trial.is_complete]
        if not evaluated:
            continue
        counted = complete or evaluated
        # Trials with the same values are one training.
        values = list({trial.values.get(SEED): trial.metrics[metric] for trial in counted}.values())
        mean = float(np.mean(values))
        error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        trust = 2 if len(complete) == len(same) else int(bool(complete))
        candidates.append((trust, sign * mean, Best(counted[0], mean, error, len(values))))
    if not candidates:
        errors = [trial.error for trial in outcomes if trial.error is not None]
        message = "no trial was evaluated"
        if errors:
            message += f": {len(errors)} of {len(outcomes)} failed, the first with {errors[0]}"
        raise Stopped(message, ExitCode.FAILED)
    *_, best = max(candidates, key=lambda candidate: candidate[:2])
    return best


def _by_settings(outcomes: Sequence[TrialOutcome]) -> list[list[TrialOutcome]]:
    """Trials that differ in their seed only."""
    found: dict[str, list[TrialOutcome]] = {}
    for trial in outcomes:
        found.setdefault(json.dumps(trial.settings, sort_keys=True), []).append(trial)
    return list(found.values())


def table_of(outcomes: Sequence[TrialOutcome], objective: str) -> list[dict[str, Any]]:
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


def importances(
    outcomes: Sequence[TrialOutcome], space: Mapping[str, Domain], objective: str
) -> dict[str, float]:
    """The share of the objective's spread that each key accounts for alone, over complete trials.

    Functional ANOVA (Hutter et al. 2014), as Optuna computes it. Empty for too few trials, and if
    the objective is the same for all.
    """
    metric, mode = OBJECTIVES[objective][0]
    complete = [one for one in outcomes if one.is_complete and metric in one.metrics]
    values = [one.metrics[metric] for one in complete]
    if len(complete) < MIN_TRIALS_FOR_IMPORTANCE:
        logger.info(
            "which keys matter is not known: %d trials are complete, and it takes %d",
            len(complete),
            MIN_TRIALS_FOR_IMPORTANCE,
        )
        return {}
    if np.ptp(values) == 0:
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
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    return {key: float(value) for key, value in found.items()}


def format_values(values: Mapping[str, Any]) -> str:
    """Values for one line, without the section's name."""
    parts = []
    for key, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.removeprefix('train.')} {text}")
    return ", ".join(parts)
