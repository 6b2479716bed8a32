"""Which trial is best, and the table of all."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest

from madpo_ray.atomic import write_csv
from madpo_ray.config.search import LogUniform, Reciprocal, Uniform
from madpo_ray.errors import Stopped
from madpo_ray.search.outcomes import (
    TrialOutcome,
    best_settings,
    format_values,
    importances,
    table_of,
)

ACCURACY = "eval_rewards/accuracies"


def trial(
    accuracy: float, *, step: int = 10, error: str | None = None, **values: Any
) -> TrialOutcome:
    metrics = {ACCURACY: accuracy, "step": step, "total_steps": 10}
    values = {key.replace("__", "."): value for key, value in values.items()}
    return TrialOutcome(values=values, evaluation=4, metrics=metrics, seconds=1.0, error=error)


def test_best_is_complete_and_has_the_highest_accuracy() -> None:
    """A failed one does not count, nor one that was stopped while it led. Of equals the first."""
    trials = [
        trial(0.6, train__beta=0.1),
        trial(0.8, train__beta=0.2),
        trial(0.8, train__beta=0.3),
        trial(0.9, train__beta=0.4, error="out of memory"),
        trial(0.95, train__beta=0.5, step=5),
        TrialOutcome({"train.beta": 0.6}, 0, {}, 1.0),
    ]
    best = best_settings(trials, "accuracy")
    assert best.trial.values == {"train.beta": 0.2}
    assert (best.mean, best.standard_error, best.num_seeds) == (0.8, None, 1)
    assert [one.state for one in trials] == [*["complete"] * 3, "failed", "stopped", "stopped"]
    assert best_settings(trials[4:], "accuracy").trial.values == {"train.beta": 0.5}
    with pytest.raises(
        Stopped, match="no trial was evaluated: 1 of 1 failed, the first with out of memory"
    ):
        best_settings(trials[3:4], "accuracy")
    with pytest.raises(Stopped, match="no trial was evaluated"):
        best_settings(trials[5:], "accuracy")


def test_best_is_by_the_mean_over_seeds() -> None:
    trials = [
        trial(0.9, train__beta=0.1, run__seed=0),
        trial(0.5, train__beta=0.1, run__seed=1),
        trial(0.8, train__beta=0.2, run__seed=0),
        trial(0.7, train__beta=0.2, run__seed=1),
    ]
    best = best_settings(trials, "accuracy")
    assert best.trial.settings == {"train.beta": 0.2}
    assert (best.mean, best.num_seeds) == (0.75, 2)
    assert best.standard_error == pytest.approx(0.05)


def test_the_same_trial_again_is_no_other_seed() -> None:
    """Trials with the same values share one training."""
    best = best_settings([trial(0.8, train__beta=0.2)] * 3, "accuracy")
    assert (best.num_seeds, best.standard_error) == (1, None)


@pytest.mark.parametrize(
    "loss", [{"error": "a loss is NaN"}, {"step": 5}], ids=["failed", "stopped"]
)
def test_seed_that_did_badly_is_not_left_out(loss: dict[str, Any]) -> None:
    """One good seed of several is no evidence, unless no settings have all of theirs."""
    lucky = [
        trial(0.9, train__beta=0.1, run__seed=0),
        trial(0.4, train__beta=0.1, run__seed=1, **loss),
    ]
    whole = [
        trial(0.7, train__beta=0.2, run__seed=0),
        trial(0.7, train__beta=0.2, run__seed=1),
    ]
    assert best_settings(lucky + whole, "accuracy").trial.settings == {"train.beta": 0.2}
    assert best_settings(lucky, "accuracy").mean == 0.9


def test_frontier_of_reward_and_kl() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (1.5, 3.0)]  # reward, KL
    trials = [
        TrialOutcome(
            {"train.beta": number},
            1,
            {"reward": gain, "kl": cost, "step": 1, "total_steps": 1},
            1.0,
        )
        for number, (gain, cost) in enumerate(points)
    ]
    rows = table_of(trials, "reward_and_kl")
    assert [row["on_frontier"] for row in rows] == [True, True, False]
    assert best_settings(trials, "reward_and_kl").trial.values == {"train.beta": 1}


def test_csv_has_a_line_per_trial(tmp_path: Path) -> None:
    rows = table_of(
        [trial(0.5, train__beta=0.1), TrialOutcome({"train.beta": 0.2}, 0, {}, 2.0, "broken")],
        "accuracy",
    )
    write_csv(tmp_path / "trials.csv", rows)
    with (tmp_path / "trials.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["state"] for line in lines] == ["complete", "failed"]
    assert lines[1]["error"] == "broken"
    assert lines[0]["train.beta"] == "0.1"


def test_importance_finds_the_key_that_matters() -> None:
    """The objective follows beta only; c_min follows from c_max and is not drawn."""
    rng = random.Random(0)
    space = {
        "train.beta": LogUniform(type="loguniform", min=0.01, max=1.0),
        "train.c_max": Uniform(type="uniform", min=1.5, max=6.0),
        "train.c_min": Reciprocal(type="reciprocal", of="train.c_max"),
    }
    trials = []
    for _ in range(30):
        beta = 10 ** rng.uniform(-2, 0)
        c_max = rng.uniform(1.5, 6)
        trials.append(trial(beta, train__beta=beta, train__c_max=c_max, train__c_min=1 / c_max))
    found = importances(trials, space, "accuracy")
    assert found.keys() == {"train.beta", "train.c_max"}
    assert found["train.beta"] > 0.9
    assert importances(trials[:5], space, "accuracy") == {}
    same = [
        trial(0.5, **{key.replace(".", "__"): v for key, v in one.values.items()}) for one in trials
    ]
    assert importances(same, space, "accuracy") == {}


def test_importance_is_a_share_of_the_whole_spread() -> None:
    """Where two keys matter only together, neither accounts for much alone."""
    space = {
        "train.beta": LogUniform(type="loguniform", min=0.01, max=1.0),
        "train.lmbda": Uniform(type="uniform", min=0.0, max=1.0),
    }
    rng = random.Random(0)
    trials = []
    for _ in range(60):
        is_large, lmbda = rng.random() < 0.5, rng.random()
        beta = 10 ** (-0.5 if is_large else -1.5)
        accuracy = 0.8 if is_large == (lmbda > 0.5) else 0.5
        trials.append(trial(accuracy, train__beta=beta, train__lmbda=lmbda))
    assert sum(importances(trials, space, "accuracy").values()) < 0.5


def test_values_in_one_line() -> None:
    values = {"train.beta": 0.123456, "train.loss_type": "madpo", "run.seed": 3}
    assert format_values(values) == "beta 0.1235, loss_type madpo, run.seed 3"
