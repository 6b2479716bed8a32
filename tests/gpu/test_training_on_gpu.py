"""Trainings over NCCL: ZeRO 0 to 3 on two GPUs, resuming, offloading, LoRA, waits of the host."""

import contextlib
import importlib.util
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from madpo_ray.training.engine import DeepSpeedEngine
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.protocols import Notice, Outcome
from madpo_ray.training.rank import run_rank
from madpo_ray.training.sites import LocalSite, join_ranks
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


@needs_two
@pytest.mark.parametrize("changes", [{}, SHARDED], ids=str)
def test_two_gpus_train_the_adapters_of_one(
    changes: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    lora = {"use_peft": True, "lora_r": 4, **STEPS}
    one = losses_of(policy_job("one", **lora), train_on, 1)
    two = losses_of(policy_job("two", **lora, **changes), train_on, 2)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"offload_optimizer": True}, {**SHARDED, "offload_optimizer": True, "offload_param": True}],
    ids=str,
)
def test_offloading_gives_the_same_losses(
    changes: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    expected = losses_of(policy_job("on_gpu", **STEPS), train_on, 1)
    found = losses_of(policy_job("offloaded", **STEPS, **changes), train_on, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """What makes the host wait for the GPU raises: `.item()`, copies to it, boolean indices.

    Not an explicit `synchronize`, which DeepSpeed calls under ZeRO-3 and with `overlap_comm`.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_without_waits(job: TrainingJob, store: str) -> None:
    """A rank whose forwards and backwards must not make the host wait."""
    for name in ("__call__", "backward"):
        method = getattr(DeepSpeedEngine, name)
        setattr(DeepSpeedEngine, name, no_waits()(method))
    join_ranks(0, 1, Path(store))
    run_rank(job, LocalSite(job))
    dist.destroy_process_group()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_host_waits_in_no_micro_batch(zero_stage: int, policy_job: MakeJob, tmp_path: Path) -> None:
    model = {"dtype": "bfloat16"}
    job = policy_job("watched", model=model, zero_stage=zero_stage, **STEPS)
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=train_without_waits, args=(job, str(tmp_path / "store")))
    process.start()
    process.join()
    assert process.exitcode == 0


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
