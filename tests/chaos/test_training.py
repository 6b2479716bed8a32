"""A training that fails at each of its file operations, and ends like an undisturbed one."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.training.checkpoints import newest_checkpoint
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.metrics import METRICS_FILE
from madpo_ray.training.rank import run_rank
from madpo_ray.training.sites import LocalSite, join_ranks
from support.faults import DAMAGES, FILE_DAMAGES, KINDS, SURVIVED, Record, arm
from support.ranks import PRELOAD, MakeJob, Ranks, assert_same_weights, metrics_of

pytestmark = pytest.mark.deepspeed

AT_ONCE = 2  # trainings, on one core each
SHORT = {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "zero_stage": 2}


def _fail(job: TrainingJob, store: str, root: Path, number: int, kind: str) -> None:
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    join_ranks(0, 1, Path(store))
    has_failed = arm(root, number, kind)
    run_rank(job, LocalSite(job))
    if has_failed():
        raise SystemExit(SURVIVED)


def train_with_fault(job: TrainingJob, folder: Path, number: int, kind: str) -> bool:
    """Trains on one rank that fails at an operation. Returns whether that was reached."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = folder / "store"
    process = context.Process(target=_fail, args=(job, str(store), folder / "run", number, kind))
    process.start()
    process.join()
    return process.exitcode != 0


@pytest.fixture
def make_job(policy_job: MakeJob, tmp_path: Path) -> Callable[[str], TrainingJob]:
    def make(name: str) -> TrainingJob:
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        job = policy_job(name, **SHORT)
        return dataclasses.replace(job, trial="", output=folder / "out", storage=folder / "ray")

    return make


@pytest.fixture
def short_run(make_job: Callable[[str], TrainingJob], tmp_path: Path) -> TrainingJob:
    """Two steps on one rank that nothing happened to."""
    job = make_job("short")
    Ranks(job, 1, tmp_path).outcome()
    return job


def assert_resumes(job: TrainingJob, short_run: TrainingJob, folder: Path) -> None:
    """The same training, started again, ends with bitwise the same weights and numbers."""
    Ranks(job, 1, folder).outcome()
    assert_same_weights(job, short_run)
    losses = [line["loss"] for line in metrics_of(job) if "loss" in line]
    assert losses == [line["loss"] for line in metrics_of(short_run) if "loss" in line]
    left = {path.name for path in job.checkpoints.glob("checkpoint_*")}
    assert left == {"checkpoint_00000001", "checkpoint_00000002"}


@pytest.mark.parametrize("kind", KINDS)
def test_training_fails_at_every_operation(
    kind: str,
    make_job: Callable[[str], TrainingJob],
    short_run: TrainingJob,
    tmp_path: Path,
    record: Record,
) -> None:

    def fails(number: int) -> bool:
        job = make_job(str(number))
        folder = tmp_path / str(number)
        if not train_with_fault(job, folder, number, kind):
            return False
        assert_resumes(job, short_run, folder)
        shutil.rmtree(folder)
        return True

    count = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in itertools.count(1, AT_ONCE):
            have_failed = list(pool.map(fails, range(first, first + AT_ONCE)))
            count += sum(have_failed)
            if not all(have_failed):
                break
    assert count > 20
    record("train, one rank", f"{kind} at the n-th file operation", count, "resumed, bitwise")


FILES = ["rank-0.json", "rank-0.pt", "state/*optim_states.pt", "state/*model_states.pt"]


@pytest.mark.parametrize("file", FILES)
def test_newest_checkpoint_is_damaged(
    file: str,
    make_job: Callable[[str], TrainingJob],
    short_run: TrainingJob,
    tmp_path: Path,
    record: Record,
) -> None:
    """The one before is used, and the run ends the same."""
    for name, damage in DAMAGES.items():
        job = make_job(name)
        shutil.copytree(short_run.storage, job.storage)
        shutil.rmtree(job.output, ignore_errors=True)
        damage(next((job.checkpoints / "checkpoint_00000002").glob(file)))
        found = newest_checkpoint(job.checkpoints)
        assert found is not None
        assert found[0] == 1
        assert_resumes(job, short_run, tmp_path / name)
    record(
        f"newest checkpoint, {file}",
        f"{len(DAMAGES)} kinds of damage",
        len(DAMAGES),
        "resumed, bitwise",
    )


def test_metrics_are_damaged(
    make_job: Callable[[str], TrainingJob],
    short_run: TrainingJob,
    tmp_path: Path,
    record: Record,
) -> None:
    """After the last checkpoint: what was lost is measured again."""
    whole: list[Any] = metrics_of(short_run)
    for name, damage in FILE_DAMAGES.items():
        job = make_job(name)
        shutil.copytree(short_run.storage, job.storage)
        damage(job.metrics / METRICS_FILE)
        outcome = Ranks(job, 1, tmp_path / name).outcome()
        line = outcome.evaluation(metrics_of(job))
        expected = next(line for line in whole if "eval_loss" in line)
        assert line["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
        assert torch.isfinite(torch.tensor(line["eval_rewards/margins"]))
        assert json.dumps(line)
    kinds = f"{len(FILE_DAMAGES)} kinds of damage"
    record(METRICS_FILE, kinds, len(FILE_DAMAGES), "evaluated again")
