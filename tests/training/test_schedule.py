"""What is due after a step, and what an evaluation does to a run's progress."""

import math

import pytest

from madpo_ray.config import PolicyConfig
from madpo_ray.training.schedule import Due, Progress, Schedule

BEST = PolicyConfig(metric_for_best_model="eval_loss", eval_steps=1, early_stopping_patience=2)


def due(step: int, *, save_requested: bool = False, **settings: object) -> Due:
    steps = {"logging_steps": 4, "save_steps": 6, "eval_steps": 5}
    schedule = Schedule(PolicyConfig(**{**steps, **settings}), total_steps=20, steps_per_epoch=7)
    return schedule.due(step, save_requested=save_requested)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, Due(log=False, evaluate=False, save=False, is_last=False)),
        (4, Due(log=True, evaluate=False, save=False, is_last=False)),
        (5, Due(log=False, evaluate=True, save=False, is_last=False)),
        (6, Due(log=True, evaluate=False, save=True, is_last=False)),
        (20, Due(log=True, evaluate=True, save=True, is_last=True)),
    ],
)
def test_due(step: int, expected: Due) -> None:
    """A save logs, so that a checkpoint holds no half-filled meter; the end does everything."""
    assert due(step) == expected


def test_request_saves() -> None:
    assert due(1, save_requested=True) == Due(log=True, evaluate=False, save=True, is_last=False)


def test_evaluation_saves_if_the_best_is_kept() -> None:
    assert not due(5).save
    assert due(5, metric_for_best_model="loss").save


def test_intervals_can_be_off() -> None:
    off = {"save_steps": None, "eval_steps": None}
    assert due(30, **off) == Due(log=False, evaluate=False, save=False, is_last=False)


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
def test_best_evaluation(values: list[float], best: int, ends: bool) -> None:
    progress = judged(values, BEST, "eval_loss")
    assert progress.best_step == best
    assert progress.ran_out_of_patience(BEST) is ends


def test_greater_is_better_unless_it_is_a_loss() -> None:
    accuracy = BEST.model_copy(update={"metric_for_best_model": "rewards/accuracies"})
    assert judged([0.5, 0.7, 0.6], accuracy, "eval_rewards/accuracies").best_step == 2
    lower = accuracy.model_copy(update={"greater_is_better": False})
    assert judged([0.5, 0.7, 0.6], lower, "eval_rewards/accuracies").best_step == 1


def test_nothing_is_best_without_a_metric() -> None:
    progress = judged([1.0, 2.0, 3.0], PolicyConfig(), "eval_loss")
    assert (progress.best_step, progress.best_metric) == (0, None)
    assert not progress.ran_out_of_patience(PolicyConfig())


def test_progress_starts_at_nothing_and_is_restored() -> None:
    start = {"step": 0, "num_tokens": 0, "skipped": 0, "best_metric": None, "best_step": 0}
    assert Progress().state_dict() == {**start, "evaluations_since_best": 0}
    progress = Progress(step=3, num_tokens=7, best_metric=0.5, best_step=2)
    assert Progress(**progress.state_dict()) == progress


def test_the_end_does_everything() -> None:
    """Although no interval is set."""
    everything = Due(log=True, evaluate=True, save=True, is_last=True)
    assert due(20, save_steps=None, eval_steps=None, logging_steps=100) == everything


def test_the_best_is_saved_after_evaluations_only() -> None:
    nothing = Due(log=False, evaluate=False, save=False, is_last=False)
    assert due(1, metric_for_best_model="loss") == nothing


@pytest.mark.parametrize("value", [0.5, math.inf])
def test_of_equals_and_infinities_the_first_is_best(value: float) -> None:
    accuracy = BEST.model_copy(update={"metric_for_best_model": "rewards/accuracies"})
    assert judged([0.5, value], accuracy, "eval_rewards/accuracies").best_step == 1
