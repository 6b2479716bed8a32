"""A loss or gradient that is not finite: the run fails or the step is skipped."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.training.checkpoints import newest_checkpoint
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.protocols import Outcome
from support.ranks import (
    MakeJob,
    Ranks,
    TrainOn,
    assert_same_weights,
    logged,
    metrics_of,
)
from support.tasks import PoisonedTask

pytestmark = pytest.mark.deepspeed

QUICK = [(0, "float32", "loss"), (2, "float32", "gradient"), (3, "bfloat16", "loss")]


def cases() -> list[Any]:
    found = []
    for case in itertools.product([0, 1, 2, 3], ["float32", "bfloat16"], ["loss", "gradient"]):
        marks = [] if case in QUICK else [pytest.mark.slow]
        found.append(pytest.param(*case, marks=marks, id="zero-{}-{}-{}".format(*case)))
    return found


def poisoned(job: TrainingJob, poison: str) -> TrainingJob:
    task = PoisonedTask(columns=job.task.columns, poison=poison)
    return dataclasses.replace(job, task=task)


@pytest.mark.parametrize(("stage", "dtype", "poison"), cases())
def test_step_is_skipped_or_fails(
    stage: int, dtype: str, poison: str, policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    """The optimizer does not move; every rank names the pairs of all."""
    settings = {
        "zero_stage": stage,
        "stage3_param_persistence_threshold": 0,
        "lr_scheduler_type": "constant",
        "save_steps": 1,
    }
    model = {"dtype": dtype}
    one_step = policy_job("one-step", model, **settings, max_steps=1)
    train_on(one_step, 2)

    lenient = policy_job("lenient", model, **settings, max_steps=2, skip_nonfinite=1)
    lenient = poisoned(lenient, poison)
    assert train_on(lenient, 2) == Outcome(2)
    assert_same_weights(lenient, one_step)
    assert metrics_of(lenient)[-2]["skipped_steps"] == 1

    strict = poisoned(policy_job("strict", model, **settings, max_steps=2), poison)
    one, other = Ranks(strict, 2, tmp_path).errors()
    assert one == other
    assert f"the {poison}" in one
    assert "of step 2 is" in one
    assert one.count("pair-") == 8
    assert "The last good checkpoint is that of step 1" in one


@pytest.mark.parametrize("variant", ["published", "madpo_paper"])
def test_running_statistics_forget_a_skipped_step(
    variant: str, policy_job: MakeJob, train_on: TrainOn
) -> None:
    job = policy_job(
        "spoiled",
        loss_type="beta_dpo",
        beta_dpo_variant=variant,
        max_steps=4,
        skip_nonfinite=1,
    )
    train_on(poisoned(job, "logps"), 2)
    found = newest_checkpoint(job.checkpoints)
    assert found is not None
    state = torch.load(found.folder / "rank-0.pt", weights_only=False)
    assert state["progress"]["skipped"] == 1
    assert all(torch.isfinite(value) for value in state["objective"]["statistics"])
    assert len(logged(job)) == 3
    assert torch.isfinite(logged(job)).all()
