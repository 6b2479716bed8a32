"""The devices that a process computes on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from madpo_ray.errors import UserError

# transformers' device_map for a model whose layers are spread over all GPUs of a process.
OVER_GPUS = "balanced"
LARGER = "raise scoring.gpus_per_actor, or set scoring.one_model_at_a_time for stage margins"


def use_device() -> torch.device:
    """The GPU that Ray gave to this process, or its CPU; set up for batches of any shape."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # cuDNN makes a plan of its attention for each new shape, in 3 ms of the host's time per layer
    # on an H200, and hardly any two micro-batches have one shape. PyTorch's other kernels serve.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", torch.cuda.current_device())


def placement(device: torch.device | None, over_gpus: bool = False) -> dict[str, Any]:
    """Weights go from the file to a GPU one by one: no process converts all of them on the host."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if over_gpus:
        return {"device_map": OVER_GPUS}
    # Under ZeRO-3 DeepSpeed decides.
    if device is None or device.type == "cpu" or is_deepspeed_zero3_enabled():
        return {}
    return {"device_map": {"": device}}


@contextlib.contextmanager
def refusing_large_models() -> Iterator[None]:
    """Turns what is raised where GPUs are full while models are loaded into a UserError."""
    try:
        yield
    except (torch.OutOfMemoryError, ValueError) as error:
        # What transformers raises of weights in 4 bits.
        is_full = isinstance(error, torch.OutOfMemoryError) or "dispatched on the CPU" in str(error)
        if not is_full:
            raise
        first_line, *_ = str(error).strip().splitlines()
        raise UserError(
            f"the models of one actor do not fit its GPUs ({first_line}): {LARGER}"
        ) from None


def require_on_gpus(model: Any, folder: Path) -> None:
    """Raises UserError if layers stayed on the host, from where each forward would fetch them."""
    if {"cpu", "meta"} & {weight.device.type for weight in model.parameters()}:
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**30
        raise UserError(
            f"{folder}: its {size:.1f} GiB of weights do not fit the free memory of the "
            f"{torch.cuda.device_count()} GPUs of one actor: {LARGER}"
        )
