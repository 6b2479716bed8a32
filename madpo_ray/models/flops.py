"""How much of the machine a training uses: model FLOPs, and the peak of a matrix product."""

import math
import resource
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from madpo_ray.data.batching import MicroBatch
from madpo_ray.models.loading import transformer_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Rows and columns of the product that shows a device's peak. On a GPU that is far more work than
# starting it takes.
PEAK_SIZES = {"cpu": 1024, "cuda": 8192}


class ModelFlops:
    """FLOPs that the mathematics of one forward and backward needs, without recomputation.

    Counts the products of linear layers: 2 per weight and token forward, 2 more if a gradient
    passes to the input (something before the layer is trained), 2 more if the weight itself is
    trained; of experts, those that a token is routed to. And the products of attention, per pair of
    tokens that see each other: 4 per channel forward, and twice that backward. Element-wise work
    and sliding windows are not counted.

    Attributes:
        per_token: of all linear layers but the head.
        per_response_token: of the head.
        per_attended: per pair of tokens of which one sees the other.
    """

    def __init__(self, model: nn.Module) -> None:
        transformer = transformer_of(model)
        head = None
        if hasattr(transformer, "get_output_embeddings"):
            head = transformer.get_output_embeddings()
        layers = layer_configs(transformer.config)
        channels = sum(map(_attention_channels, layers)) / len(layers)
        experts_per_token = getattr(layers[0], "num_experts_per_tok", None) or 0

        # In the order of the forward: what comes after a trained weight passes a gradient on.
        self.per_token = 0
        self.per_response_token = 0
        self.per_attended = 0.0
        is_trained_before = False
        for module in model.modules():
            flops = _linear_flops(module, is_trained_before)
            flops += _expert_flops(module, experts_per_token, is_trained_before)
            if module is head:
                self.per_response_token += flops
            else:
                self.per_token += flops

            own = module.parameters(recurse=False)
            is_trained_before = is_trained_before or any(p.requires_grad for p in own)
            if type(module).__name__.endswith("Attention"):
                is_trained = is_trained_before or any(p.requires_grad for p in module.parameters())
                self.per_attended += 4 * channels * (3 if is_trained else 1)

    def __call__(self, batch: MicroBatch) -> float:
        """FLOPs of a micro-batch, without padding."""
        linear = self.per_token * batch.num_real_tokens
        head = self.per_response_token * int(batch.target_ids.numel())
        return linear + head + self.per_attended * batch.num_attended


def layer_configs(architecture: "PretrainedConfig") -> "list[PretrainedConfig]":
    """The config of each layer of a model's text part; those of some models differ."""
    text = architecture.get_text_config()
    if text.is_heterogeneous:
        return list(text.per_layer_config)
    return [text] * int(text.num_hidden_layers)


def _attention_channels(layer: "PretrainedConfig") -> int:
    head_dim = getattr(layer, "head_dim", None)
    if head_dim:
        return int(layer.num_attention_heads * head_dim)
    return int(layer.hidden_size)


def _linear_flops(module: nn.Module, is_trained_before: bool) -> int:
    """Per token; 0 for a module without a matrix of its own."""
    # The module's own weight: peft's wrappers also hand out what they wrap.
    weight = module._parameters.get("weight")
    if weight is None or isinstance(module, nn.Embedding):
        return 0
    # The full shape, of which partitioning (ZeRO-3) or packing (4 bits) may have left less.
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    if len(shape) != 2:
        return 0
    return int(2 * math.prod(shape)) * _num_products(weight, is_trained_before)


def _expert_flops(module: nn.Module, experts_per_token: int, is_trained_before: bool) -> int:
    """Per token, of the experts that it is routed to; their matrices are stacked, (E, ., .)."""
    flops = 0
    for name, weight in module._parameters.items():
        if weight is None or name == "weight":
            continue
        shape = tuple(getattr(weight, "ds_shape", weight.shape))
        if len(shape) == 3:
            per_product = 2 * math.prod(shape[1:]) * experts_per_token
            flops += per_product * _num_products(weight, is_trained_before)
    return flops


def _num_products(weight: nn.Parameter, is_trained_before: bool) -> int:
    """Forward, for the gradient of the input, and for that of the weight."""
    return 1 + int(is_trained_before) + int(weight.requires_grad)


def peak_flops(
    dtype: torch.dtype, device: torch.device, size: int | None = None, seconds: float = 1.0
) -> float:
    """FLOP/s of the fastest square matrix product, on this process's threads or GPU.

    One second is long enough to catch an undisturbed product; other processes are still starting
    at that time. At least one product is measured.
    """
    size = size or PEAK_SIZES.get(device.type, PEAK_SIZES["cuda"])
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)

    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        _synchronise(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    if device.type == "cuda":
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the peak is to be that of the training
    return 2 * size**3 / best


def peak_memory_bytes() -> int:
    """Of this rank so far: on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
