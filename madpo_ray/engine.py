"""DeepSpeed: config, start, checkpoint, whole weights. The only file that imports it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo_ray.artifacts import hash_file, write_json
from madpo_ray.config import TrainingConfig

TAG = "state"


def deepspeed_config(settings: TrainingConfig, *, dtype: str) -> dict[str, Any]:
    """DeepSpeed's own config. Accumulation is ours: the loop sets each boundary, so DeepSpeed is told of none."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": settings.zero_stage,
            "stage3_param_persistence_threshold": settings.stage3_param_persistence_threshold,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def initialize(module: nn.Module, settings: TrainingConfig, *, dtype: str, total_steps: int) -> Any:
    """A DeepSpeed engine around `module`, with AdamW over what can be trained and the config's learning-rate
    schedule."""
    # DeepSpeed takes this for a launcher's job and looks for MPI where the variables are missing; Ray has set them.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from transformers import get_scheduler

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
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
        config=deepspeed_config(settings, dtype=dtype),
    )
    return engine


def world_size() -> int:
    return dist.get_world_size()


def sum_over_ranks(value: float, device: torch.device) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


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
    listings = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    if not listings or len(listings) != listings[0]["world_size"]:
        return None
    for name, digest in (item for listing in listings for item in listing["files"].items()):
        if not (folder / name).exists() or hash_file(folder / name) != digest:
            return None
    return int(listings[0]["step"])


def load(engine: Any, folder: Path) -> dict[str, Any]:
    """Restores a checkpoint and returns its `state`. Its files are pickles: `checkpoint_step` has checked their
    hashes."""
    engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    state: dict[str, Any] = torch.load(folder / f"rank-{dist.get_rank()}.pt", weights_only=False)
    random = state.pop("random")
    torch.set_rng_state(random["cpu"])
    if random["cuda"] is not None:
        torch.cuda.set_rng_state(random["cuda"])
    dist.barrier()
    return state


def full_state(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    """What `model` trained, whole, on rank 0's CPU: LoRA's part, or every parameter and saved buffer. Others get {}."""
    import deepspeed

    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {}
    for name, tensor in {**buffers, **trained}.items():
        gathered = engine.zero_optimization_stage() == 3 and name in trained
        with deepspeed.zero.GatheredParameters([tensor], enabled=gathered):
            if dist.get_rank() == 0:
                state[name] = tensor.detach().cpu().clone()
    return state
