"""The same numbers, however many ranks there are and however a step is cut."""

import dataclasses
from typing import Any

import pytest
import torch

from madpo_ray.training.job import TrainingJob
from support.ranks import (
    SHARDED,
    THIRTY_STEPS,
    MakeJob,
    TrainOn,
    assert_same_weights,
    logged,
    weights_of,
)
from support.tasks import PartitionedTask

pytestmark = pytest.mark.deepspeed

# The epoch's last step is short, so that some ranks have none of it.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "two-pairs-at-a-time": (1, {"per_device_train_batch_size": 2}),
    "one-pair-at-a-time": (1, {"per_device_train_batch_size": 1}),
    "two-ranks": (2, {"per_device_train_batch_size": 4, "zero_stage": 0}),
    "three-ranks": (3, {"per_device_train_batch_size": 3, "zero_stage": 1}),
    "four-ranks": (4, {"per_device_train_batch_size": 2}),
    "overlapped": (2, {"per_device_train_batch_size": 2, "overlap_comm": True}),
    "budget": (2, {"max_tokens_per_device": 90}),
    "sharded": (2, {"per_device_train_batch_size": 3, **SHARDED}),
    "separate-rows": (2, {"model": {"packed_rows": "off"}}),
    "compiled": (2, {"model": {"torch_compile": True}}),
    "offloaded": (2, {"zero_stage": 2, "offload_optimizer": True}),
    "all-offloaded": (2, {"offload_optimizer": True, "offload_param": True, **SHARDED}),
    "recomputed": (
        2,
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True, **SHARDED},
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.slow) if one == "compiled" else one for one in SETTINGS],
)
def test_losses_are_equal(
    name: str, undisturbed: TrainingJob, policy_job: MakeJob, train_on: TrainOn
) -> None:
    """Each loss to 1e-5, each weight to 1e-4, after thirty steps at 1e-3."""
    ranks, changes = SETTINGS[name]
    job = policy_job(name, **THIRTY_STEPS, **changes)
    train_on(job, ranks)
    torch.testing.assert_close(logged(job), logged(undisturbed), rtol=0, atol=1e-5)
    expected = weights_of(undisturbed)
    for key, weight in weights_of(job).items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-4)


def test_same_run_is_bitwise_equal(
    undisturbed: TrainingJob, policy_job: MakeJob, train_on: TrainOn
) -> None:
    again = policy_job("again", **THIRTY_STEPS, per_device_train_batch_size=8)
    train_on(again, 1)
    assert torch.equal(logged(again), logged(undisturbed))
    assert_same_weights(again, undisturbed)


def test_metrics_are_of_all_ranks(policy_job: MakeJob, train_on: TrainOn) -> None:
    """Extremes and counts, too."""
    jobs = []
    for ranks in (1, 2):
        job = policy_job(f"ranks-{ranks}", max_steps=3, per_device_train_batch_size=2)
        train_on(job, ranks)
        jobs.append(job)
    exact = ("margin/mean", "weight/min", "weight/max", "num_tokens", "weight/mean")
    for name in (*exact, "weight/effective_sample_size", "rewards/margins", "entropy"):
        one, two = (logged(job, name) for job in jobs)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_parameters_are_sharded_under_zero_3(policy_job: MakeJob, train_on: TrainOn) -> None:
    job = policy_job("partitioned", **SHARDED, max_steps=1)
    train_on(dataclasses.replace(job, task=PartitionedTask(columns=job.task.columns)), 2)
