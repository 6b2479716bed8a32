"""How much of the machine a training uses: model FLOPs against the peak of a matrix product on the same device."""

import math
import resource
import time
from typing import Any

import torch
from torch import nn

from madpo_ray.batching import MicroBatch
from madpo_ray.models import base_of


class ModelFlops:
    """FLOPs that the mathematics of one forward and backward needs, without recomputation.

    Counts the products of linear layers: 2 per weight and token forward, 2 more where a gradient passes to the input
    (something before the layer is trained), 2 more where the weight itself is trained; and those of attention, for
    the pairs of tokens that see each other: 4 a channel forward, and twice that backward. Element-wise work is left
    out, and so are sliding windows.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        self._per_token, self._per_response_token, self._per_attended, trained_before = 0, 0, 0, False
        config = base.config.get_text_config()
        heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
        channels = heads * size if size else config.hidden_size
        for module in model.modules():
            trained_here = any(p.requires_grad for p in module.parameters(recurse=False))
            weight = module._parameters.get("weight")  # its own: peft's wrappers hand out what they wrap
            # The whole weight, of which partitioning (ZeRO-3) or packing (4 bits) may have left less.
            shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
            if isinstance(module, nn.Linear):
                shape = (module.out_features, module.in_features)
            if weight is not None and len(shape) == 2 and not isinstance(module, nn.Embedding):
                flops = 2 * math.prod(shape) * (1 + trained_before + weight.requires_grad)
                if module is head:
                    self._per_response_token += flops
                else:
                    self._per_token += flops
            trained_before = trained_before or trained_here
            if type(module).__name__.endswith("Attention"):
                trained = trained_before or any(p.requires_grad for p in module.parameters())
                self._per_attended += 4 * channels * (3 if trained else 1)

    def __call__(self, batch: MicroBatch) -> int:
        """FLOPs of a micro-batch; padding counts for nothing."""
        responses = int(batch.target_ids.numel())
        linear = self._per_token * batch.num_real_tokens + self._per_response_token * responses
        return linear + self._per_attended * batch.num_attended


# Rows and columns of the product that shows a device's peak: on a GPU, far more work than starting it takes.
PEAK_SIZES = {"cpu": 1024, "cuda": 8192}


def peak_flops(dtype: torch.dtype, device: torch.device, size: int | None = None, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest square matrix product in a while, on this process's threads or GPU.

    The while is long enough for a quiet moment: at a run's start other processes are still busy starting.
    """
    size = size or PEAK_SIZES.get(device.type, PEAK_SIZES["cuda"])
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory_bytes() -> int:
    """Of this rank so far: on the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
