"""DeepSpeed: config, start, checkpoint, whole weights. The only file that imports it."""

import argparse
import contextlib
import functools
import gc
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo_ray.artifacts import hash_file, write_json
from madpo_ray.config import TrainingConfig
from madpo_ray.models import saved_tensors

logger = logging.getLogger(__name__)

TAG = "state"
UNIVERSAL = "universal"


def deepspeed_config(settings: TrainingConfig, *, dtype: str, resized: bool = False) -> dict[str, Any]:
    """DeepSpeed's own config. Accumulation is ours: the loop sets each boundary, so DeepSpeed is told of none."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": settings.zero_stage,
            "stage3_param_persistence_threshold": settings.stage3_param_persistence_threshold,
            "reduce_bucket_size": settings.reduce_bucket_size,
            "stage3_max_live_parameters": settings.stage3_max_live_parameters,
            **({"offload_optimizer": {"device": "cpu"}} if settings.offload_optimizer else {}),
            **({"offload_param": {"device": "cpu"}} if settings.offload_param else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is vectorised on CPUs, too
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "checkpoint": {"load_universal": resized},
    }


def _deepspeed() -> Any:
    # DeepSpeed takes this for a launcher's job and looks for MPI where the variables are missing; Ray has set them.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # An inference kernel for CPUs, compiled under a lock file: a process killed there would leave the lock behind, and
    # every later run would wait for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(
    module: nn.Module, settings: TrainingConfig, *, dtype: str, total_steps: int, resized: bool = False
) -> Any:
    """A DeepSpeed engine around `module`, with AdamW over what can be trained and the config's learning-rate schedule.

    `resized` where it is to load a checkpoint that another number of ranks saved.
    """
    from transformers import get_scheduler

    deepspeed = _deepspeed()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else math.ceil(settings.warmup_steps * total_steps)
    schedule = get_scheduler(
        settings.lr_scheduler_type, optimizer, num_warmup_steps=int(warmup), num_training_steps=total_steps
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(settings, dtype=dtype, resized=resized),
    )
    return engine


def world_size() -> int:
    return dist.get_world_size()


def sum_over_ranks(value: float, device: torch.device) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def max_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [float(value) for value in largest]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in their order."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def backward(engine: Any, loss: Tensor) -> None:
    """Adds the gradient of `loss` summed, not averaged, over ranks and micro-batches of the step."""
    engine.backward(loss * world_size())


def step(engine: Any) -> float:
    """One optimizer step; returns the gradient norm before clipping, over all ranks.

    A norm that is not finite means that the optimizer has not moved: under ZeRO and bfloat16 DeepSpeed skips such a
    step, in silence; without, it would apply it, so the norm is looked at before.
    """
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        before = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(before):
            engine.step()
        else:
            engine.zero_grad()
        return before
    engine.step()
    return float(engine.get_global_grad_norm())


def learning_rate(engine: Any) -> float:
    return float(engine.get_lr()[0])


def save(engine: Any, folder: Path, state: Mapping[str, Any]) -> None:
    """This rank's part of a checkpoint; all ranks call it. Frozen weights stay out: they are the base model's."""
    rank = dist.get_rank()
    engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    torch.save({**state, "random": random}, folder / f"rank-{rank}.pt")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        "step": state["progress"]["step"],
        "world_size": dist.get_world_size(),
        "files": {str(path.relative_to(folder)): hash_file(path) for path in files},
    }
    write_json(folder / f"rank-{rank}.json", listing)


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint of which every rank's files are there as they were written; None for any other."""
    try:
        listings = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
        files = {name: digest for listing in listings for name, digest in listing["files"].items()}
        whole = all(hash_file(folder / name) == digest for name, digest in files.items())
    except (ValueError, FileNotFoundError):  # a torn listing; a missing file, or one that Ray is deleting
        return None
    if not whole or not listings or len(listings) != listings[0]["world_size"]:
        return None
    return int(listings[0]["step"])


def newest_checkpoint(folder: Path, step: int | None = None) -> tuple[int, Path] | None:
    """Step and folder of a run's newest whole checkpoint (of that step, where one is given), or None.

    A newer one that is torn or was changed since it was written is passed over with a warning.
    """
    claims = {path: _claimed_step(path) for path in folder.glob("checkpoint_*") if path.is_dir()}
    candidates = [path for path, claimed in claims.items() if step is None or claimed in (step, math.inf)]
    for candidate in sorted(candidates, key=lambda path: claims[path], reverse=True):
        found = checkpoint_step(candidate)
        if found is None:
            logger.warning("checkpoint %s is torn or was changed; taking the one before it", candidate)
        elif step in (None, found):
            return found, candidate
    return None


def agreed_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """The folder of `newest_checkpoint` as rank 0 sees it, on every rank: one reads and hashes it, and none differs."""
    found = newest_checkpoint(folder, step) if dist.get_rank() == 0 else None
    agreed = [found[1] if found else None]
    dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def _claimed_step(folder: Path) -> float:
    """What a checkpoint says of itself; above all others where it says nothing, to be looked at first."""
    try:
        return float(json.loads((folder / "rank-0.json").read_text())["step"])
    except (FileNotFoundError, ValueError):
        return math.inf


def is_resized(folder: Path, settings: TrainingConfig) -> bool:
    """Whether a checkpoint's optimizer state is cut for another number of ranks than there are now."""
    return settings.zero_stage > 0 and _saved_world_size(folder) != dist.get_world_size()


def load(engine: Any, folder: Path) -> dict[str, Any]:
    """Restores a checkpoint and returns its `state`. Its files are pickles: `checkpoint_step` has checked their
    hashes.

    One of another number of ranks is brought into DeepSpeed's universal form first, inside its folder, by rank 0.
    """
    rank, saved = dist.get_rank(), _saved_world_size(folder)
    if engine.load_universal_checkpoint():
        if rank == 0:
            _make_universal(folder)
        dist.barrier()
        engine.load_checkpoint(str(folder / UNIVERSAL), tag=TAG, load_module_strict=False)
        # One count of steps came for all parameters, on the CPU; fused AdamW wants each on its parameter's device.
        for parameter, values in engine.basic_optimizer.state.items():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].to(parameter.device, copy=True)
    else:
        engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    state: dict[str, Any] = torch.load(folder / f"rank-{rank % saved}.pt", weights_only=False)
    random = state.pop("random")
    if rank < saved:  # a rank that was not there before keeps the random state that it started with
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])
    dist.barrier()
    return state


def _saved_world_size(folder: Path) -> int:
    return int(json.loads((folder / "rank-0.json").read_text())["world_size"])


def _make_universal(folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    # Made anew each time: nothing but what was hashed is ever unpickled.
    partial = folder / f"{UNIVERSAL}.partial"
    for stale in (partial, folder / UNIVERSAL):
        shutil.rmtree(stale, ignore_errors=True)
    logger.warning("%s was saved by %d ranks; converting it", folder, _saved_world_size(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(folder / TAG),
                output_folder=str(partial / TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    partial.rename(folder / UNIVERSAL)


def collect_garbage() -> None:
    """Frees an engine that nobody refers to any more: it and its module refer to each other, and DeepSpeed's ZeRO-3
    keeps both in a list and in a cache of its own."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    caches = [found for found in gc.get_objects() if isinstance(found, functools._lru_cache_wrapper)]
    for cache in caches:
        if str(cache.__module__).startswith("deepspeed."):
            cache.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trained_tensors(engine: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `model` trained, one tensor after another, whole on rank 0's CPU (others get empty ones): LoRA's part, or
    every parameter and saved buffer. All ranks run through it together; none ever holds more than one tensor whole.
    """
    deepspeed = _deepspeed()
    sharded = engine.zero_optimization_stage() == 3
    for name, tensor in saved_tensors(model):
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=sharded and isinstance(tensor, nn.Parameter)):
            yield name, tensor.detach().cpu().clone() if dist.get_rank() == 0 else torch.empty(0)


@contextlib.contextmanager
def sharded_construction(settings: TrainingConfig, *, dtype: str) -> Iterator[None]:
    """Under ZeRO-3, a transformers model loaded in the block is constructed and filled in shards: rank 0 reads one
    tensor after another from the files, and no rank ever holds all of them."""
    if settings.zero_stage != 3:
        yield
        return
    from transformers.integrations import deepspeed as integration

    _deepspeed()
    # transformers asks this object, held by a weak reference, whether ZeRO-3 is on.
    wanted = integration.HfDeepSpeedConfig(deepspeed_config(settings, dtype=dtype))
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del wanted
