"""Checkpoints of a run: written by all ranks, found by step, checked by hash, deleted by age.

A checkpoint folder holds DeepSpeed's files, a `rank-*.pt` per rank (progress, objective, random
state) and a `rank-*.json` per rank that lists the rank's files with their hashes. The hashes find
accidents, not attackers: the files are pickles, so a run's folder must be trusted like a program.
"""

import errno
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from madpo_ray.artifacts.building import discard
from madpo_ray.artifacts.hashes import damaged_files
from madpo_ray.artifacts.manifest import library_versions
from madpo_ray.atomic import sync, write_json
from madpo_ray.disk import explain_disk_error, find_write_error, in_units
from madpo_ray.errors import UserError
from madpo_ray.models.saving import save_hashed
from madpo_ray.training.collectives import broadcast_object, gather_objects
from madpo_ray.training.engine import DeepSpeedEngine, make_universal
from madpo_ray.training.schedule import Progress

logger = logging.getLogger(__name__)

UNIVERSAL = "universal"
# What a listing that cannot be read, or is none, raises.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written. A restart would end in the same way."""


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Writes this rank's part of a checkpoint; all ranks call it.

    Args:
        state: what else to restore; `state["progress"]["step"]` names the checkpoint.

    Raises:
        CheckpointWriteError: the disk is full or broken. Names the folder and what is needed.
    """
    run = folder.parent
    rank = dist.get_rank()
    if rank == 0:
        discard(folder)  # a torn one of the same step
    dist.barrier()
    try:
        files = engine.save(folder)
        own_file = folder / f"rank-{rank}.pt"
        files[own_file] = save_hashed({**state, **_own_state(engine)}, own_file)
        listing = {
            "step": state["progress"]["step"],
            "best_step": state["progress"]["best_step"],
            "world_size": dist.get_world_size(),
            "versions": library_versions(),
            "files": {str(file.relative_to(folder)): entry for file, entry in files.items()},
        }
        for file in files:
            sync(file)
        write_json(folder / f"rank-{rank}.json", listing)  # the last file, which syncs the folder
    except (OSError, RuntimeError) as error:
        if (broken := find_write_error(error)) is None:
            raise
        raise CheckpointWriteError(
            f"the checkpoint {folder} was not written; this rank's part needs at least "
            f"{in_units(engine.checkpoint_bytes())}: {explain_disk_error(broken, run)}"
        ) from error


def _own_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Random state of this rank, and what it trains."""
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    random_state = {"cpu": torch.get_rng_state(), "cuda": on_gpu}
    return {"random": random_state, "shapes": engine.trained_shapes()}


def check_disk_space(engine: DeepSpeedEngine, run: Path) -> None:
    """Raises CheckpointWriteError, on every rank, if the next checkpoint cannot fit."""
    needed = sum(gather_objects(engine.checkpoint_bytes()))
    free = 0
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run).free
    free = broadcast_object(free)
    if free < needed:
        raise CheckpointWriteError(
            f"a checkpoint needs at least {in_units(needed)}, and {in_units(free)} are free in "
            f"{run}: make room there, or set run.storage_path. The same command resumes"
        )


def load_checkpoint(engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Restores a checkpoint whose hashes were checked, and returns its `state`.

    A checkpoint of another number of ranks is first converted inside its folder, by rank 0.

    Raises:
        UserError: it holds other parameters than the model trains: transformers or peft name them
            differently by now, or the model was replaced.
    """
    # Progress, objective and random state of this rank.
    rank = dist.get_rank()
    saved_ranks = int(_listing(folder, 0)["world_size"])
    part = folder / f"rank-{rank % saved_ranks}.pt"
    state: dict[str, Any] = torch.load(part, weights_only=True)
    _check_shapes(folder, state.pop("shapes"), engine.trained_shapes())
    random_state = state.pop("random")

    # Weights and optimizer.
    if is_resized(folder, engine.zero_stage):
        if rank == 0:
            _convert(folder, saved_ranks)
        dist.barrier()
        engine.load(folder / UNIVERSAL)
    else:
        engine.load(folder)

    if rank < saved_ranks:  # a new rank keeps the random state that it started with
        torch.set_rng_state(random_state["cpu"])
        if random_state["cuda"] is not None:
            torch.cuda.set_rng_state(random_state["cuda"])
    dist.barrier()
    return state


def _check_shapes(folder: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """DeepSpeed would keep the fresh weights of every parameter that a checkpoint lacks."""
    differing = sorted(
        name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)
    )
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} was saved from other parameters: {len(differing)} differ, such as {name} "
            f"({saved.get(name)} there, {own.get(name)} here). Use the versions of torch, "
            "transformers and peft that it was saved with, or set another run.name"
        )


def warn_of_versions(folder: Path) -> None:
    """Warns if a checkpoint was saved with other libraries: its run may end with other numbers."""
    own = library_versions()
    saved = _listing(folder, 0).get("versions", {})
    changed = [
        f"{name} {saved.get(name)} -> {own[name]}" for name in own if saved.get(name) != own[name]
    ]
    if changed:
        logger.warning("%s was saved with other libraries: %s", folder, ", ".join(changed))


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint whose files are all there, as every rank wrote them; else None."""
    try:
        listings = _listings(folder)
        files = {name: entry for listing in listings for name, entry in listing["files"].items()}
        if damaged_files(folder, files, compare_hashes=True):
            return None
        return int(listings[0]["step"])
    except DAMAGE:  # a torn listing, or a file that is missing or cannot be read
        return None


def _listing(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank wrote. Raises one of DAMAGE if its listing is missing, torn or unreadable."""
    listing: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
    return listing


def _listings(folder: Path) -> list[dict[str, Any]]:
    """What every rank wrote. Raises as `_listing` does."""
    first = _listing(folder, 0)
    return [first, *(_listing(folder, rank) for rank in range(1, int(first["world_size"])))]


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    step: int
    folder: Path


def newest_checkpoint(run: Path, step: int | None = None) -> Checkpoint | None:
    """A run's newest complete checkpoint, or None.

    Only that step's, if one is given. A newer one that is torn, cannot be read or was changed after
    it was written is skipped with a warning, and so is one whose best step is lost.
    """
    claims = {path: _claimed_step(path) for path in checkpoint_folders(run)}
    if step is not None:
        claims = {path: claim for path, claim in claims.items() if claim == step}
    for candidate in sorted(claims, key=lambda path: claims[path], reverse=True):
        found = checkpoint_step(candidate)
        if found is None:
            logger.warning("checkpoint %s is torn, was changed or cannot be read", candidate)
        elif step is None and not _has_best(run, candidate):
            logger.warning("the best step's checkpoint is lost, so %s is of no use", candidate)
        else:
            return Checkpoint(found, candidate)
    return None


def newest_step(run: Path) -> int:
    """The step of a run's newest complete checkpoint; 0 without one."""
    return newest.step if (newest := newest_checkpoint(run)) else 0


def _has_best(run: Path, candidate: Path) -> bool:
    """Whether the step whose weights would be exported now is complete, too."""
    step, best = (_listing(candidate, 0)[name] for name in ("step", "best_step"))
    return best in (0, step) or newest_checkpoint(run, best) is not None


def agreed_checkpoint(run: Path, step: int | None = None) -> Path | None:
    """The folder of `newest_checkpoint` as rank 0 sees it, on every rank. A collective."""
    found = newest_checkpoint(run, step) if dist.get_rank() == 0 else None
    agreed: Path | None = broadcast_object(found.folder if found else None)
    return agreed


def prune_checkpoints(run: Path, progress: Progress, *, limit: int) -> None:
    """Deletes torn checkpoints, and old ones. For one rank, while no other writes.

    The newest, the best, and up to `limit` in all are kept. So is what cannot be read, since it may
    be complete, and what is later than `progress`, which will be reached again.
    """
    for path in checkpoint_folders(run):
        if _is_torn(path):
            discard(path)

    claims = {path: _claimed_step(path) for path in checkpoint_folders(run)}
    earlier = sorted({claim for claim in claims.values() if claim <= progress.step}, reverse=True)
    kept = {progress.step, progress.best_step}
    for other in earlier:
        if len(kept - {0}) < limit:
            kept.add(other)
    for path, claim in claims.items():
        if claim <= progress.step and claim not in kept:
            discard(path)


def is_resized(folder: Path | None, zero_stage: int) -> bool:
    """Whether there is a checkpoint whose state is sharded for another number of ranks."""
    if folder is None or zero_stage == 0:
        return False
    return int(_listing(folder, 0)["world_size"]) != dist.get_world_size()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return run / f"checkpoint_{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders of all checkpoints of a run, complete or not."""
    return [path for path in run.glob("checkpoint_*") if path.is_dir()]


def _claimed_step(folder: Path) -> int:
    """The step that a checkpoint claims; the one in its name if its listing cannot be read."""
    try:
        return int(_listing(folder, 0)["step"])
    except DAMAGE:
        number = folder.name.rpartition("_")[2]
        return int(number) if number.isdigit() else sys.maxsize  # it may be the newest


def _is_torn(folder: Path) -> bool:
    """Whether a listing or a file is missing or shorter. False if that cannot be found out."""
    try:
        files = [item for listing in _listings(folder) for item in listing["files"].items()]
        return any((folder / name).stat().st_size != entry["size"] for name, entry in files)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
    except DAMAGE:
        return True


def _convert(folder: Path, saved_ranks: int) -> None:
    # Made again each time: nothing but what was hashed is ever unpickled.
    partial = folder / f"{UNIVERSAL}.partial"
    for stale in (partial, folder / UNIVERSAL):
        shutil.rmtree(stale, ignore_errors=True)
    logger.warning("%s was saved by %d ranks; converting it", folder, saved_ranks)
    try:
        make_universal(folder, partial)
    except (OSError, RuntimeError) as error:
        if (broken := find_write_error(error)) is None:
            raise
        message = f"{folder} was not converted: {explain_disk_error(broken, folder)}"
        raise CheckpointWriteError(message) from error
    partial.rename(folder / UNIVERSAL)
