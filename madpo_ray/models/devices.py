"""The devices that a process computes on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from madpo_ray.errors import UserError, first_line

# transformers' device_map for a model whose layers are spread over all GPUs of a process.
OVER_GPUS = "balanced"
HOW_TO_FIT = "raise scoring.gpus_per_actor, or set scoring.one_model_at_a_time for stage margins"


def use_device(num_gpus: int = 0) -> torch.device:
    """The GPU that Ray gave to this process, or its CPU; set up for batches of any shape.

    Args:
        num_gpus: how many GPUs that is, at least.

    Raises:
        UserError: PyTorch sees none of them.
    """
    if not torch.cuda.is_available():
        if num_gpus:
            raise UserError(
                f"Ray gave a process {num_gpus} GPUs, and its PyTorch ({torch.__version__}) sees "
                "none: install the CUDA build of the same version on every node, or set "
                "cluster.use_gpu: false"
            )
        return torch.device("cpu")
    # cuDNN makes a plan of its attention for each new shape, in 3 ms of the host's time per layer
    # on an H200, and hardly any two micro-batches have one shape. PyTorch's other kernels serve.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", torch.cuda.current_device())


def placement(device: torch.device | None, over_gpus: bool = False) -> dict[str, Any]:
    """Arguments of `from_pretrained` that place weights: from the file straight to a GPU.

    No process converts all of them on the host.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if over_gpus:
        return {"device_map": OVER_GPUS}
    # Under ZeRO-3 DeepSpeed decides.
    if device is None or device.type == "cpu" or is_deepspeed_zero3_enabled():
        return {}
    return {"device_map": {"": device}}


@contextlib.contextmanager
def refusing_large_models() -> Iterator[None]:
    """Turns an out-of-memory error while models are loaded into a UserError."""
    try:
        yield
    except (torch.OutOfMemoryError, ValueError) as error:
        # What transformers raises of weights in 4 bits.
        is_full = isinstance(error, torch.OutOfMemoryError) or "dispatched on the CPU" in str(error)
        if not is_full:
            raise
        raise UserError(
            f"the models of one actor do not fit its GPUs ({first_line(error)}): {HOW_TO_FIT}"
        ) from None


@contextlib.contextmanager
def refusing_large_batches(keys: str) -> Iterator[None]:
    """Turns an out-of-memory error of a GPU into a UserError.

    Args:
        keys: of the config, which make batches smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch does not fit the memory of a GPU ({first_line(error)}): lower {keys}, or "
            f"{HOW_TO_FIT}"
        ) from None


def is_spread(model: Any) -> bool:
    """Whether the layers of a transformers model are on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def require_on_gpus(model: Any, folder: Path) -> None:
    """Raises UserError if layers stayed on the host, from where each forward would fetch them."""
    if {"cpu", "meta"} & {weight.device.type for weight in model.parameters()}:
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**30
        raise UserError(
            f"{folder}: its {size:.1f} GiB of weights do not fit the free memory of the "
            f"{torch.cuda.device_count()} GPUs of one actor: {HOW_TO_FIT}"
        )
