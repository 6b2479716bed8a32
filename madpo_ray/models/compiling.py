"""Layers compiled by PyTorch."""

import functools
from typing import Any

import torch
from torch import nn

from madpo_ray.errors import UserError
from madpo_ray.models.attention import PACKED, packed_attention


def compile_layers(transformer: nn.Module) -> None:
    """Compiles each layer when it is first called, for rows of any length.

    The attention of packed rows stays as it is: what it does follows from the row's segments, so
    that it would be compiled for every row.

    Args:
        transformer: of transformers, also inside of a PEFT model.

    Raises:
        UserError: the model has no layers of transformers' kind.
    """
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        part for part in transformer.modules() if isinstance(part, GradientCheckpointingLayer)
    ]
    if not layers:
        name = type(transformer).__name__
        raise UserError(f"{name} has no layers that can be compiled: remove model.torch_compile")
    AttentionInterface.register(PACKED, _uncompiled_attention())
    for layer in layers:
        layer.compile(dynamic=True)


@functools.cache  # another one would be compiled around again
def _uncompiled_attention() -> Any:
    return torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
