"""What an evaluation does to a run's progress. The loop itself runs in test_worker.py."""

import math

import pytest

from madpo_ray.config import PolicyConfig
from madpo_ray.loop import Progress

SETTINGS = PolicyConfig(metric_for_best_model="eval_loss", eval_steps=1, early_stopping_patience=2)


def judged(values: list[float], settings: PolicyConfig, name: str) -> Progress:
    progress = Progress()
    for step, value in enumerate(values, start=1):
        progress.step = step
        progress.judge({name: value}, settings)
    return progress


@pytest.mark.parametrize(
    ("values", "best", "ends"),
    [
        ([3.0, 2.0, 2.5], 2, False),
        ([2.0, 2.0, 2.0], 1, True),  # of equals the first
        ([math.nan, 2.0, 3.0], 2, False),
        ([2.0, math.nan, math.inf], 1, True),
        ([math.nan, math.nan], 0, True),
    ],
)
def test_the_best_evaluation(values: list[float], best: int, ends: bool) -> None:
    progress = judged(values, SETTINGS, "eval_loss")
    assert progress.best_step == best
    assert progress.ran_out_of_patience(SETTINGS) is ends


def test_greater_is_better_unless_it_is_a_loss() -> None:
    accuracy = SETTINGS.model_copy(update={"metric_for_best_model": "rewards/accuracies"})
    assert judged([0.5, 0.7, 0.6], accuracy, "eval_rewards/accuracies").best_step == 2
    lower = accuracy.model_copy(update={"greater_is_better": False})
    assert judged([0.5, 0.7, 0.6], lower, "eval_rewards/accuracies").best_step == 1


def test_without_a_metric_nothing_is_best() -> None:
    progress = judged([1.0, 2.0, 3.0], PolicyConfig(), "eval_loss")
    assert (progress.best_step, progress.best_metric) == (0, None)
    assert not progress.ran_out_of_patience(PolicyConfig())
