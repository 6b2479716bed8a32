"""DeepSpeed: config, start, step, checkpoint, full weights. The only file that imports it."""

import argparse
import contextlib
import gc
import inspect
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo_ray.artifacts.hashes import FileEntry
from madpo_ray.config import TrainingConfig
from madpo_ray.data.batching import MicroBatch
from madpo_ray.models.devices import use_device
from madpo_ray.models.saving import save_hashed, saved_tensors
from madpo_ray.training.collectives import take_over_timeout

# DeepSpeed and transformers take seconds to import, and only ranks need them: they are imported
# inside functions.

TAG = "state"
ADAM_BYTES = 8  # two float32 moments per parameter


def deepspeed_config(
    settings: TrainingConfig, *, dtype: str, resized: bool = False
) -> dict[str, Any]:
    """DeepSpeed's own config.

    The loop sets each boundary of accumulation, so DeepSpeed's own is 1.
    """
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "stage3_param_persistence_threshold": settings.stage3_param_persistence_threshold,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "stage3_max_live_parameters": settings.stage3_max_live_parameters,
    }

    if settings.overlap_comm is not None:
        zero["overlap_comm"] = settings.overlap_comm

    # What is kept in CPU memory.
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_param:
        zero["offload_param"] = {"device": "cpu"}

    is_bfloat16 = dtype == "bfloat16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": is_bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is vectorised on CPUs, too
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the device at every forward and step.
        "timers": {"throughput": {"enabled": False}},
        "checkpoint": {"load_universal": resized},
    }
    if is_bfloat16 and settings.zero_stage >= 2:
        # Micro-batches are added up in float32: in bfloat16 the sum of 64 is off by 1 %. Below
        # stage 2 it would take 4 bytes per parameter on every rank.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class DeepSpeedEngine:
    """A module with AdamW over its trainable parameters and the settings' schedule.

    Set `resized` to load a checkpoint that another number of ranks saved.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: TrainingConfig,
        *,
        dtype: str,
        total_steps: int,
        resized: bool = False,
    ) -> None:
        from transformers import get_scheduler

        # The optimizer, over what is trained.
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

        # The schedule of its learning rate.
        warmup_steps = settings.warmup_steps
        if warmup_steps < 1:
            warmup_steps = math.ceil(warmup_steps * total_steps)
        schedule = get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(warmup_steps),
            num_training_steps=total_steps,
        )

        # DeepSpeed around both. The group that it makes has its backend's time-out.
        deepspeed = _deepspeed()
        deepspeed.init_distributed(verbose=False)
        take_over_timeout(deepspeed.utils.groups._get_sequence_data_parallel_group(), use_device())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trainable,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_config(settings, dtype=dtype, resized=resized),
        )
        self.module: nn.Module = self._engine.module
        self.device: torch.device = self._engine.device
        self.zero_stage = settings.zero_stage

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def __call__(self, batch: MicroBatch) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self._engine(batch)
        return outputs

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`, summed, not averaged, over ranks and micro-batches."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * dist.get_world_size())

    def step(self) -> float:
        """One optimizer step; the gradient norm before clipping, over all ranks.

        If the norm is not finite, the optimizer has not moved: under ZeRO and bfloat16 DeepSpeed
        skips such a step silently; otherwise it would apply it, so the norm is checked before.
        """
        if self.zero_stage == 0 and not self._engine.bfloat16_enabled():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def learning_rate(self) -> float:
        return float(self._engine.get_lr()[0])

    def save(self, folder: Path) -> dict[Path, FileEntry]:
        """Writes this rank's part, and returns its files with their hashes.

        Frozen weights are not saved: they are the base model's.
        """
        # DeepSpeed reports neither which files a rank writes nor what: its writer is replaced.
        written = {}
        writer = self._engine.checkpoint_engine
        write = writer.save

        def write_and_hash(state_dict: dict[str, Any], path: str) -> None:
            written[Path(path)] = save_hashed(state_dict, Path(path))

        writer.save = write_and_hash
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
        finally:
            writer.save = write
        return written

    def checkpoint_bytes(self) -> int:
        """What this rank's part of a checkpoint needs, at least: Adam's two moments in float32."""
        sizes = [getattr(p, "ds_numel", p.numel()) for p in self._trained().values()]
        shards = dist.get_world_size() if self.zero_stage > 0 else 1
        is_writer = self.zero_stage > 0 or dist.get_rank() == 0
        return ADAM_BYTES * sum(sizes) // shards if is_writer else 0

    def trained_shapes(self) -> dict[str, list[int]]:
        """Complete shapes of all trained parameters, by name."""
        return {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._trained().items()
        }

    def _trained(self) -> dict[str, nn.Parameter]:
        parameters = self.module.named_parameters()
        return {name: parameter for name, parameter in parameters if parameter.requires_grad}

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, or, if resized, what `make_universal` made of it."""
        self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if not self._engine.load_universal_checkpoint():
            return
        # One count of steps came for all parameters, on the CPU; fused AdamW wants each on its
        # parameter's device.
        for parameter, values in self._engine.basic_optimizer.state.items():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].to(parameter.device, copy=True)

    def trained_tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What `model` trained: LoRA's part, or every parameter and saved buffer.

        One tensor after another, complete on rank 0's CPU; other ranks get empty ones. All ranks
        iterate together; none ever holds more than one complete tensor.
        """
        gathered = _deepspeed().zero.GatheredParameters
        is_writer = dist.get_rank() == 0
        for name, tensor in saved_tensors(model):
            is_parameter = isinstance(tensor, nn.Parameter)
            if hasattr(model, "peft_config") and is_parameter and not tensor.requires_grad:
                continue
            with gathered([tensor], enabled=is_parameter and self.zero_stage == 3):
                yield name, tensor.detach().cpu().clone() if is_writer else torch.empty(0)

    def close(self) -> None:
        """Frees the engine and its module, so that another one fits in memory."""
        self._engine.destroy()
        del self._engine, self.module
        _clear_zero3_caches()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _deepspeed() -> Any:
    # DeepSpeed looks for MPI if a launcher's variables are missing; Ray sets the others.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # An inference kernel for CPUs is compiled under a lock file. A process killed there would leave
    # the lock, and every later run would wait for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _clear_zero3_caches() -> None:
    """Two places where DeepSpeed 0.19 keeps a trained module alive under ZeRO-3."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator,
    )

    parameter_offload.FWD_MODULE_STACK.clear()
    # A method with an unbounded lru_cache, below a decorator that does not expose it.
    name = "_PartitionedParameterCoordinator__params_to_release"
    method = inspect.getattr_static(PartitionedParameterCoordinator, name)
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def make_universal(source: Path, target: Path) -> None:
    """Converts a checkpoint's optimizer state so that another number of ranks can load it."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source / TAG),
        output_folder=str(target / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(options)


@contextlib.contextmanager
def sharded_construction(settings: TrainingConfig, *, dtype: str) -> Iterator[None]:
    """Under ZeRO-3, a transformers model loaded in the block is constructed and filled in shards.

    Rank 0 reads one tensor after another from the files, and no rank ever holds all of them.
    """
    if settings.zero_stage != 3:
        yield
        return
    from transformers.integrations import deepspeed as integration

    _deepspeed()
    # transformers holds this object by a weak reference and asks it whether ZeRO-3 is on.
    zero3 = integration.HfDeepSpeedConfig(deepspeed_config(settings, dtype=dtype))
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del zero3
