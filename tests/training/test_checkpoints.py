"""Which checkpoint a run resumes from."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.artifacts.hashes import FileEntry, describe_files
from madpo_ray.artifacts.manifest import library_versions
from madpo_ray.training.checkpoints import (
    checkpoint_step,
    newest_checkpoint,
    prune_checkpoints,
    warn_of_versions,
)
from madpo_ray.training.schedule import Progress
from support.ranks import MakeJob, Ranks, TrainOn, weights_of


def entries_of(folder: Path, *names: str) -> dict[str, FileEntry]:
    everything = describe_files(folder)
    return {name: everything[name] for name in names}


def write_checkpoint(folder: Path, step: int, ranks: int = 2, best_step: int = 0) -> Path:
    """What `save_checkpoint` writes, with files that hold only text."""
    checkpoint = folder / f"checkpoint_{step:08d}"
    checkpoint.mkdir(parents=True)
    for rank in range(ranks):
        part = checkpoint / f"part-{rank}.pt"
        part.write_text(f"step {step}, rank {rank}")
        files = entries_of(checkpoint, part.name)
        listing = {"step": step, "best_step": best_step, "world_size": ranks, "files": files}
        (checkpoint / f"rank-{rank}.json").write_text(json.dumps(listing))
    return checkpoint


def test_newest_is_by_step(tmp_path: Path) -> None:
    """Not by name or time."""
    newest = write_checkpoint(tmp_path, 9).rename(tmp_path / "checkpoint_a")
    write_checkpoint(tmp_path, 4)
    assert newest_checkpoint(tmp_path) == (9, newest)
    assert newest_checkpoint(tmp_path, step=4) == (4, tmp_path / "checkpoint_00000004")
    assert newest_checkpoint(tmp_path, step=5) is None
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("fault", ["changed", "missing part", "missing rank", "torn listing"])
def test_torn_checkpoint_is_skipped(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, 4)
    torn = write_checkpoint(tmp_path, 9)
    match fault:
        case "changed":
            (torn / "part-1.pt").write_text("step 9, rank 2")
        case "missing part":
            (torn / "part-1.pt").unlink()
        case "missing rank":
            (torn / "rank-1.json").unlink()
        case "torn listing":
            listing = torn / "rank-0.json"
            listing.write_text(listing.read_text()[:-1])
    assert checkpoint_step(torn) is None
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == 4
    assert "is torn, was changed or cannot be read" in caplog.text


def test_files_next_to_checkpoints_are_none(tmp_path: Path) -> None:
    """Ray keeps a file of such a name there."""
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.deepspeed
def test_run_resumes_before_a_torn_checkpoint(policy_job: MakeJob, train_on: TrainOn) -> None:
    """And ends with the same weights."""
    job = policy_job("torn", max_steps=6, save_steps=2)
    train_on(job, 2)
    finished = weights_of(job)
    newest = sorted(job.checkpoints.glob("checkpoint_*"))[-1]
    part = next(newest.rglob("*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:-1])
    found = newest_checkpoint(job.checkpoints)
    assert found is not None
    assert found[0] == 4
    train_on(job, 2)
    again = weights_of(job)
    assert all(torch.equal(weight, finished[name]) for name, weight in again.items())


@pytest.mark.parametrize(
    ("step", "limit", "best_step", "kept"),
    [
        (9, 1, 0, [9]),
        (9, 2, 0, [6, 9]),
        (9, 2, 3, [3, 9]),
        (9, 1, 3, [3, 9]),
        (9, 3, 3, [3, 6, 9]),
        (6, 1, 0, [6, 9]),  # 9 will be reached again
        (0, 2, 0, [3, 6, 9]),
    ],
)
def test_old_and_torn_checkpoints_are_deleted(
    step: int, limit: int, best_step: int, kept: list[int], tmp_path: Path
) -> None:
    for saved in (3, 6, 9):
        write_checkpoint(tmp_path, saved)
    (write_checkpoint(tmp_path, 7) / "rank-0.json").write_text("")
    (write_checkpoint(tmp_path, 12) / "part-1.pt").write_text("")
    (tmp_path / ".checkpoint_00000001.trash-0").mkdir()  # of a kill in an earlier deletion
    prune_checkpoints(tmp_path, Progress(step, best_step=best_step), limit=limit)
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"checkpoint_{i:08d}" for i in kept]


def test_unreadable_checkpoint_is_skipped_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may fail for a moment: another one is used, and nothing is deleted."""
    write_checkpoint(tmp_path, 3)
    newest = write_checkpoint(tmp_path, 6)
    read_text = Path.read_text

    def fail(path: Path, *arguments: Any, **options: Any) -> str:
        if newest in path.parents:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read_text(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found[0] == 3
        prune_checkpoints(tmp_path, Progress(3), limit=1)
        prune_checkpoints(tmp_path, Progress(9, best_step=6), limit=1)
    assert newest_checkpoint(tmp_path) == (6, newest)


def test_other_libraries_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_checkpoint(tmp_path, 3)
    listing = json.loads((folder / "rank-0.json").read_text())
    listing["versions"] = library_versions()
    (folder / "rank-0.json").write_text(json.dumps(listing))
    warn_of_versions(folder)
    assert caplog.text == ""
    listing["versions"]["torch"] = "1.0"
    (folder / "rank-0.json").write_text(json.dumps(listing))
    warn_of_versions(folder)
    assert "was saved with other libraries: torch 1.0 -> " in caplog.text


@pytest.mark.deepspeed
def test_checkpoint_of_other_parameters_is_refused(policy_job: MakeJob, tmp_path: Path) -> None:
    """DeepSpeed would keep fresh weights for the names that it does not find."""
    job = policy_job("renamed", max_steps=2)
    Ranks(job, 1, tmp_path).outcome()
    (folder,) = job.checkpoints.glob("checkpoint_*")
    state = torch.load(folder / "rank-0.pt", weights_only=True)
    name, shape = state["shapes"].popitem()
    state["shapes"][f"old.{name}"] = shape
    torch.save(state, folder / "rank-0.pt")
    listing = json.loads((folder / "rank-0.json").read_text())
    listing["files"] = entries_of(folder, *listing["files"])
    (folder / "rank-0.json").write_text(json.dumps(listing))
    (error,) = Ranks(job, 1, tmp_path).errors()
    assert "was saved from other parameters: 2 differ" in error


def test_checkpoint_without_its_best_step_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its training would end without the weights that it has to export."""
    write_checkpoint(tmp_path, 2, best_step=2)
    best = write_checkpoint(tmp_path, 4, best_step=4)
    newest = write_checkpoint(tmp_path, 6, best_step=4)
    assert newest_checkpoint(tmp_path) == (6, newest)
    (best / "part-0.pt").write_text("step 5, rank 0")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == 2
    assert "the best step's checkpoint is lost" in caplog.text


def test_lost_best_checkpoint_is_trained_again(policy_job: MakeJob, train_on: TrainOn) -> None:
    """To the same weights, also if it was lost after the last step."""
    job = policy_job(
        "best",
        max_steps=6,
        save_steps=2,
        eval_steps=2,
        save_total_limit=9,
        metric_for_best_model="rewards/margins",
    )
    outcome = train_on(job, 1)
    finished = weights_of(job)
    best = job.checkpoints / f"checkpoint_{outcome.step:08d}"
    part = next(best.rglob("*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:-1])
    assert train_on(job, 1) == outcome
    again = weights_of(job)
    assert all(torch.equal(weight, finished[name]) for name, weight in again.items())
