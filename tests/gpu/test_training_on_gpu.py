"""Trainings over NCCL: ZeRO 0 to 3 on two GPUs, resuming, QLoRA."""

import importlib.util
from typing import Any

import pytest
import torch

from madpo_ray.training.job import TrainingJob
from madpo_ray.training.protocols import Notice, Outcome
from support.ranks import SHARDED, MakeJob, TrainOn, logged

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
STEPS = {"max_steps": 12, "num_train_epochs": 3}


def losses_of(job: TrainingJob, train_on: TrainOn, ranks: int) -> torch.Tensor:
    train_on(job, ranks)
    return logged(job)


@needs_two
@pytest.mark.parametrize("changes", [{"zero_stage": 0}, {"zero_stage": 1}, {}, SHARDED], ids=str)
def test_two_gpus_give_the_losses_of_one(
    changes: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    """In float32 to 1e-4: sums over ranks have another order."""
    one = losses_of(policy_job("one", **STEPS), train_on, 1)
    two = losses_of(policy_job("two", **STEPS, **changes), train_on, 2)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


@needs_two
@pytest.mark.parametrize("changes", [{"overlap_comm": True}, SHARDED], ids=str)
def test_two_gpus_in_bfloat16(
    changes: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    model = {"dtype": "bfloat16"}
    one = losses_of(policy_job("one", model=model, **STEPS), train_on, 1)
    two = losses_of(policy_job("two", model=model, **STEPS, **changes), train_on, 2)
    torch.testing.assert_close(two, one, rtol=0, atol=0.05)


def stop_after_one_step(job: TrainingJob, train_on: TrainOn, ranks: int) -> None:
    job.stop_file.parent.mkdir(parents=True, exist_ok=True)
    job.stop_file.write_text("SIGTERM")
    assert train_on(job, ranks) == Outcome(1, Notice.TERMINATED)
    job.stop_file.unlink()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_two)])
@pytest.mark.parametrize("changes", [{}, SHARDED], ids=str)
def test_resumes_with_the_same_losses(
    changes: dict[str, Any], ranks: int, policy_job: MakeJob, train_on: TrainOn
) -> None:
    expected = losses_of(policy_job("undisturbed", **STEPS, **changes), train_on, ranks)
    job = policy_job("stopped", **STEPS, **changes)
    stop_after_one_step(job, train_on, ranks)
    train_on(job, ranks)
    torch.testing.assert_close(logged(job), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_qlora_steps_saves_and_resumes(policy_job: MakeJob, train_on: TrainOn) -> None:
    model = {"dtype": "bfloat16", "load_in_4bit": True}
    job = policy_job("qlora", model=model, use_peft=True, lora_r=4, eval_steps=1, **STEPS)
    stop_after_one_step(job, train_on, 1)
    train_on(job, 1)
    losses = logged(job)
    assert len(losses) == STEPS["max_steps"]
    assert losses.isfinite().all()
    # Of the same pairs: those of single steps differ in difficulty.
    evaluated = logged(job, "eval_loss")
    assert evaluated[-1] < evaluated[0]
    assert (job.output / "model" / "adapter_model.safetensors").exists()
