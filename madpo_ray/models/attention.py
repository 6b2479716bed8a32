"""Which models may read a pair as one row, and the masks that they need for it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from madpo_ray.config import ModelConfig
from madpo_ray.data.batching import MicroBatch
from madpo_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MASKED_KERNELS = ("sdpa", "eager", "flex_attention")
# Keys of a config that say how far a token sees, in words that the masks below do not know.
_LIMITS = re.compile("window|chunk|(?<!num_)local|index_topk")
_KNOWN_LIMITS = {"sliding_window", "use_sliding_window", "max_window_layers"}
_KNOWN_PATTERNS = {"sliding_window_pattern", "_sliding_window_pattern"}  # become layer_types


def load_architecture(folder: Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """transformers' config of a model's folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # transformers validates the values of a config with errors of many kinds.
    except Exception as error:
        raise UserError(f"{folder}/config.json describes no model: {error}") from None


def may_share_prefix(settings: ModelConfig, architecture: "PretrainedConfig") -> bool:
    """Whether a pair may be read as one row [prompt | chosen | rejected].

    The masks are ours then, so each layer's attention has to be full or a window that they can
    hold. Whether the model's numbers come out is found at load (`reading.find_reading`).
    """
    architecture = architecture.get_text_config()
    layer_types = set(getattr(architecture, "layer_types", None) or ["full_attention"])
    limits = {
        name for name, value in architecture.to_dict().items() if value and _LIMITS.search(name)
    }
    return (
        settings.shared_prefix == "auto"
        and settings.attn_implementation in _MASKED_KERNELS
        and layer_types <= {"full_attention", "sliding_attention"}
        and limits <= _KNOWN_LIMITS | _KNOWN_PATTERNS
    )


def attention_masks(model: "PreTrainedModel", batch: MicroBatch) -> Any:
    """The mask that the model's layers use: for shared rows a 4-D one, or one per kind of layer.

    transformers uses a 4-D mask as it is, so a sliding window has to be in it, counted on the
    restarted positions.
    """
    mask = batch.attention_mask
    if mask.dim() == 2:
        return mask
    full = _mask_for(model, mask)
    window = getattr(model.config, "sliding_window", None)
    if window is None:
        return full

    distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]  # (B, L, L)
    sliding = _mask_for(model, mask & (distance < window)[:, None])
    if getattr(model.config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


def _mask_for(model: "PreTrainedModel", mask: Tensor) -> Any:
    """A boolean mask (B, 1, L, L) in the form that the model's attention kernel reads."""
    # transformers passes a mask on as it is, in one form per kernel.
    match model.config._attn_implementation:
        case "eager":  # adds the mask to the scores
            dtype = next(model.parameters()).dtype
            zeros = torch.zeros_like(mask, dtype=dtype)
            return zeros.masked_fill(~mask, torch.finfo(dtype).min)
        case "flex_attention":  # reads which blocks of the scores to skip or to mask
            from torch.nn.attention.flex_attention import create_block_mask

            size, _, length, _ = mask.shape
            return create_block_mask(
                lambda row, _, query, key: mask[row, 0, query, key],
                size,
                None,
                length,
                length,
                device=mask.device,
            )
    return mask
