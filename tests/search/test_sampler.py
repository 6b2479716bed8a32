"""Draws of a search that resumes are those of one that was not interrupted."""

from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution

from madpo_ray.search.sampler import NumberedSampler

SPACE = {"x": FloatDistribution(-5, 5), "y": FloatDistribution(-5, 5)}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def run(count: int, known: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A search for the minimum of x^2 + y^2; `known` trials come first."""
    study = optuna.create_study(sampler=NumberedSampler(seed, 30))
    for values in known:
        study.enqueue_trial(values)
    for _ in range(count):
        trial = study.ask(fixed_distributions=SPACE)
        study.tell(trial, trial.params["x"] ** 2 + trial.params["y"] ** 2)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("interrupted_after", [1, 7, 15])
def test_resumes_with_the_same_draws(interrupted_after: int) -> None:
    """Before and after TPE's ten random trials."""
    complete = run(25, [])
    assert run(25, complete[:interrupted_after]) == complete
    assert run(25, [], seed=1) != complete


def test_finds_better_values_than_random_ones() -> None:
    found = run(40, [])

    def median(trials: list[dict[str, Any]]) -> float:
        values = sorted(trial["x"] ** 2 + trial["y"] ** 2 for trial in trials)
        return values[len(values) // 2]

    assert median(found[20:]) < median(found[:10]) / 2


def test_keys_of_a_trial_are_drawn_independently() -> None:
    assert all(trial["x"] != trial["y"] for trial in run(5, []))
