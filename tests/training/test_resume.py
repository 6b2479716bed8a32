"""Kills, stops and other numbers of ranks: a resumed run ends like an undisturbed one."""

import dataclasses
import json
import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.artifacts.tables import read_split
from madpo_ray.training.checkpoints import newest_checkpoint
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.protocols import Notice, Outcome
from support.ranks import (
    SHARDED,
    THIRTY_STEPS,
    MakeJob,
    Ranks,
    TrainOn,
    assert_same_weights,
    logged,
)
from support.tasks import RecordingTask, SeedTask

pytestmark = pytest.mark.deepspeed


def saved_step(job: TrainingJob) -> int:
    found = newest_checkpoint(job.checkpoints)
    assert found is not None
    return found[0]


def ask_to_stop(job: TrainingJob) -> None:
    job.stop_file.parent.mkdir(parents=True, exist_ok=True)
    job.stop_file.write_text("SIGTERM")


def assert_each_epoch_read_every_pair(record: Path, job: TrainingJob, epochs: int) -> None:
    """A step that was repeated read the same pairs again."""
    everyone = read_split(job.rows, "train", ("pair_id",))["pair_id"].to_pylist()
    read: dict[int, set[str]] = {}
    for file in record.iterdir():
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                step, ids = json.loads(line)
                read.setdefault(step, set()).update(ids)
    per_epoch = math.ceil(len(everyone) / 8)
    for epoch in range(epochs):
        steps = [read[step] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert sum(map(len, steps)) == len(everyone)
        assert set().union(*steps) == set(everyone)


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param([1], marks=pytest.mark.slow),
        pytest.param([0], marks=pytest.mark.slow),
        [0, 1],
    ],
)
def test_resumes_after_kill(
    victims: list[int], policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    """kill -9 at five random moments: bitwise the same weights, and every pair once per epoch."""
    settings = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 2, "zero_stage": 2}
    undisturbed = policy_job("undisturbed", **settings)
    train_on(undisturbed, 2)
    rng = random.Random(sum(victims) + len(victims))
    for draw in range(5):
        record = tmp_path / f"record-{draw}"
        record.mkdir()
        job = policy_job(f"killed-{draw}", **settings)
        task = RecordingTask(columns=job.task.columns, record=record)
        job = dataclasses.replace(job, task=task)

        # A step is logged, then saved: some milliseconds after the log of an even step are within
        # a save.
        ranks = Ranks(job, 2, tmp_path)
        step = rng.randint(2, 10)
        ranks.kill_at(job, step, victims, delay_s=rng.uniform(0, 0.1))
        assert -signal.SIGKILL in ranks.join()

        assert train_on(job, 2).step == len(logged(undisturbed))
        assert torch.equal(logged(job), logged(undisturbed))
        assert_same_weights(job, undisturbed)
        assert_each_epoch_read_every_pair(record, job, epochs=2)

        # From the newest checkpoint, or the one before if the kill tore that.
        killed = {f"{process.pid}.jsonl" for process in ranks.processes}
        resumed = [file for file in record.iterdir() if file.name not in killed]
        first_steps = [json.loads(file.read_text().splitlines()[0])[0] for file in resumed]
        assert min(first_steps) >= step - 2


def test_resumes_after_stop_request(
    undisturbed: TrainingJob, policy_job: MakeJob, train_on: TrainOn
) -> None:
    """SIGTERM and the deadline save after the current step and export nothing."""
    job = policy_job("interrupted", **THIRTY_STEPS)
    ask_to_stop(job)
    assert train_on(job, 2) == Outcome(1, Notice.TERMINATED)
    job.stop_file.unlink()
    hurried = dataclasses.replace(job, deadline=time.time())
    assert train_on(hurried, 2) == Outcome(2, Notice.OUT_OF_TIME)
    assert not (job.output / "model").exists()
    assert train_on(job, 2) == Outcome(30)
    torch.testing.assert_close(logged(job), logged(undisturbed), rtol=0, atol=1e-5)


def test_beta_dpo_resumes_its_statistics(policy_job: MakeJob, train_on: TrainOn) -> None:
    settings = {"loss_type": "beta_dpo", "max_steps": 9, "num_train_epochs": 2}
    undisturbed = policy_job("undisturbed", **settings)
    train_on(undisturbed, 2)
    job = policy_job("interrupted", **settings)
    for step in range(1, 5):
        ask_to_stop(job)
        assert train_on(job, 2) == Outcome(step, Notice.TERMINATED)
    job.stop_file.unlink()
    train_on(job, 2)
    assert torch.equal(logged(job), logged(undisturbed))
    assert_same_weights(job, undisturbed)


def test_random_state_is_restored(policy_job: MakeJob, train_on: TrainOn) -> None:
    """With dropout on: bitwise."""
    settings = {
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.3,
        "disable_dropout": False,
        "merge_adapter": True,
    }
    undisturbed = policy_job("undisturbed", **settings)
    train_on(undisturbed, 2)
    job = policy_job("interrupted", **settings)
    ask_to_stop(job)
    assert train_on(job, 2) == Outcome(1, Notice.TERMINATED)
    job.stop_file.unlink()
    train_on(job, 2)
    assert torch.equal(logged(job), logged(undisturbed))
    assert_same_weights(job, undisturbed)


def test_each_rank_has_its_own_seed(policy_job: MakeJob, train_on: TrainOn, tmp_path: Path) -> None:
    record = tmp_path / "recorded"
    record.mkdir()
    job = policy_job("seeds", max_steps=1)
    task = SeedTask(columns=job.task.columns, record=record)
    train_on(dataclasses.replace(job, task=task), 2)
    assert sorted(file.read_text() for file in record.iterdir()) == ["0", "1"]


def test_run_out_of_patience_is_not_trained_on(policy_job: MakeJob, train_on: TrainOn) -> None:
    """When it starts again, as after a kill during its export."""
    settings = {"metric_for_best_model": "loss", "eval_steps": 1, "early_stopping_patience": 1}
    job = policy_job("patience", **settings, learning_rate=0.5, max_steps=9)
    outcome = train_on(job, 1)
    steps = len(logged(job))
    assert outcome.step < steps < 9
    assert train_on(job, 1) == outcome
    assert len(logged(job)) == steps


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param({"zero_stage": 1}, marks=pytest.mark.slow),
        {"zero_stage": 2},
        SHARDED,
    ],
)
def test_resumes_on_other_ranks(
    zero: dict[str, Any],
    undisturbed: TrainingJob,
    policy_job: MakeJob,
    train_on: TrainOn,
    tmp_path: Path,
) -> None:
    """Two ranks, resumed on one and on four: losses to 1e-5."""
    job = policy_job("two-ranks", **THIRTY_STEPS, **zero, save_steps=10)
    Ranks(job, 2, tmp_path).kill_when(lambda: newest_checkpoint(job.checkpoints))
    assert saved_step(job) < 30
    for number in (1, 4):
        name = f"resumed-on-{number}"
        resized = dataclasses.replace(job, trial=name, output=tmp_path / name)
        shutil.copytree(job.checkpoints, resized.checkpoints)
        assert train_on(resized, number) == Outcome(30)
        torch.testing.assert_close(logged(resized), logged(undisturbed), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"zero_stage": 2}, SHARDED])
def test_lora_resumes_on_other_ranks(
    zero: dict[str, Any], policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    lora = {**THIRTY_STEPS, **zero, "use_peft": True, "lora_r": 4, "save_steps": 10}
    undisturbed = policy_job("undisturbed", **lora)
    train_on(undisturbed, 2)
    job = policy_job("lora", **lora)
    Ranks(job, 2, tmp_path).kill_when(lambda: newest_checkpoint(job.checkpoints))
    assert saved_step(job) < 30
    assert train_on(job, 1) == Outcome(30)
    torch.testing.assert_close(logged(job), logged(undisturbed), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_resumes_on_other_ranks(
    stage: int, policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    """Weights and moments are complete; sums over ranks round differently in bfloat16."""
    settings = {**THIRTY_STEPS, **SHARDED, "zero_stage": stage, "save_steps": 10}
    undisturbed = policy_job("undisturbed", {"dtype": "bfloat16"}, **settings)
    train_on(undisturbed, 2)
    job = policy_job("bf16", {"dtype": "bfloat16"}, **settings)
    Ranks(job, 2, tmp_path).kill_when(lambda: newest_checkpoint(job.checkpoints))
    saved = saved_step(job)
    assert saved < 30
    assert train_on(job, 1) == Outcome(30)
    near = slice(saved, saved + 3)
    expected = logged(undisturbed)[near]
    torch.testing.assert_close(logged(job)[near], expected, rtol=0, atol=0.02)
    # Far from what the initial weights would give.
    assert (expected - math.log(2)).abs().min() > 0.04
