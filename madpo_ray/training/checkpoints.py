"""Checkpoints of a run: written by all ranks, found by step, checked by hash.

A checkpoint folder holds DeepSpeed's files, a `rank-*.pt` per rank (progress, objective, random
state) and a `rank-*.json` per rank that lists the rank's files with their hashes. The hashes find
accidents, not attackers: the files are pickles, so a run's folder must be trusted like a program.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from madpo_ray.artifacts.manifest import hash_file
from madpo_ray.atomic import write_json
from madpo_ray.training.collectives import broadcast_object
from madpo_ray.training.engine import DeepSpeedEngine, make_universal

logger = logging.getLogger(__name__)

UNIVERSAL = "universal"


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Writes this rank's part of a checkpoint; all ranks call it.

    Args:
        state: what else to restore; `state["progress"]["step"]` names the checkpoint.
    """
    rank = dist.get_rank()
    engine.save(folder)
    random_state = {"cpu": torch.get_rng_state(), "cuda": None}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    torch.save({**state, "random": random_state}, folder / f"rank-{rank}.pt")

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        "step": state["progress"]["step"],
        "world_size": dist.get_world_size(),
        "files": {str(path.relative_to(folder)): hash_file(path) for path in files},
    }
    write_json(folder / f"rank-{rank}.json", listing)


def load_checkpoint(engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Restores a checkpoint whose hashes were checked, and returns its `state`.

    A checkpoint of another number of ranks is first converted inside its folder, by rank 0.
    """
    # Weights and optimizer.
    rank = dist.get_rank()
    saved_ranks = _saved_world_size(folder)
    if is_resized(folder, engine.zero_stage):
        if rank == 0:
            _convert(folder, saved_ranks)
        dist.barrier()
        engine.load(folder / UNIVERSAL)
    else:
        engine.load(folder)

    # Progress, objective and random state of this rank.
    part = folder / f"rank-{rank % saved_ranks}.pt"
    state: dict[str, Any] = torch.load(part, weights_only=False)
    random_state = state.pop("random")
    if rank < saved_ranks:  # a new rank keeps the random state that it started with
        torch.set_rng_state(random_state["cpu"])
        if random_state["cuda"] is not None:
            torch.cuda.set_rng_state(random_state["cuda"])
    dist.barrier()
    return state


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint whose files are all there, as every rank wrote them; else None."""
    try:
        listings = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
        hashes = {name: value for listing in listings for name, value in listing["files"].items()}
        is_intact = all(hash_file(folder / name) == value for name, value in hashes.items())
    except (ValueError, FileNotFoundError):  # a torn listing; a file that is missing or deleted
        return None
    if not is_intact or not listings or len(listings) != listings[0]["world_size"]:
        return None
    return int(listings[0]["step"])


def newest_checkpoint(run: Path, step: int | None = None) -> tuple[int, Path] | None:
    """Step and folder of a run's newest complete checkpoint, or None.

    Only that step's, if one is given. A newer one that is torn or was changed after it was written
    is skipped with a warning.
    """
    claims = {path: _claimed_step(path) for path in run.glob("checkpoint_*") if path.is_dir()}
    if step is not None:
        claims = {path: claim for path, claim in claims.items() if claim in (step, math.inf)}
    for candidate in sorted(claims, key=lambda path: claims[path], reverse=True):
        found = checkpoint_step(candidate)
        if found is None:
            logger.warning("checkpoint %s is torn or was changed; using an older one", candidate)
        elif step is None or found == step:
            return found, candidate
    return None


def agreed_checkpoint(run: Path, step: int | None = None) -> Path | None:
    """The folder of `newest_checkpoint` as rank 0 sees it, on every rank. A collective."""
    found = newest_checkpoint(run, step) if dist.get_rank() == 0 else None
    agreed: Path | None = broadcast_object(found[1] if found else None)
    return agreed


def is_resized(folder: Path | None, zero_stage: int) -> bool:
    """Whether there is a checkpoint whose state is sharded for another number of ranks."""
    if folder is None or zero_stage == 0:
        return False
    return _saved_world_size(folder) != dist.get_world_size()


def _claimed_step(folder: Path) -> float:
    """The step that a checkpoint claims; infinity if it claims none, to be checked first."""
    try:
        return float(json.loads((folder / "rank-0.json").read_text())["step"])
    except (FileNotFoundError, ValueError):
        return math.inf


def _saved_world_size(folder: Path) -> int:
    return int(json.loads((folder / "rank-0.json").read_text())["world_size"])


def _convert(folder: Path, saved_ranks: int) -> None:
    # Made again each time: nothing but what was hashed is ever unpickled.
    partial = folder / f"{UNIVERSAL}.partial"
    for stale in (partial, folder / UNIVERSAL):
        shutil.rmtree(stale, ignore_errors=True)
    logger.warning("%s was saved by %d ranks; converting it", folder, saved_ranks)
    make_universal(folder, partial)
    partial.rename(folder / UNIVERSAL)
