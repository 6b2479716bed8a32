"""Layers compiled by PyTorch."""

import torch
from torch import nn

from madpo_ray.models.attention import PACKED, packed_attention


def compile_layers(transformer: nn.Module) -> None:
    """Compiles each layer when it is first called, for rows of any length.

    The attention of packed rows stays as it is: what it does follows from the row's segments, and a
    compiled one would be compiled for every row.

    Args:
        transformer: of transformers, also inside of a PEFT model.

    Raises:
        RuntimeError: the model has no layers of transformers' kind.
    """
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        part for part in transformer.modules() if isinstance(part, GradientCheckpointingLayer)
    ]
    if not layers:
        raise RuntimeError(f"{type(transformer).__name__} has no layers that could be compiled")
    uncompiled = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED, uncompiled)
    for layer in layers:
        layer.compile(dynamic=True)
