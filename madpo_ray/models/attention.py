"""Which models may read packed rows, and the attention that keeps the texts of such a row apart.

Legend: T tokens of a packed row, K keys (prompts once per response), D channels of a head.
"""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo_ray.config import ModelConfig
from madpo_ray.data.batching import PackedRow, Segment
from madpo_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The name of `packed_attention` among transformers' implementations of attention.
PACKED = "madpo_ray_packed"

# Keys of a config that say how far a token sees, in words that `packed_attention` does not know.
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


def may_pack(settings: ModelConfig, architecture: "PretrainedConfig") -> bool:
    """Whether the pairs of a micro-batch may be read as one packed row.

    Each layer's attention has to be full or a sliding window: a limit of thousands of tokens would
    not show in the short pairs that are compared at load (`reading.find_reading`).
    """
    architecture = architecture.get_text_config()
    layer_types = set(getattr(architecture, "layer_types", None) or ["full_attention"])
    limits = {
        name for name, value in architecture.to_dict().items() if value and _LIMITS.search(name)
    }
    return (
        settings.packed_rows == "auto"
        and layer_types <= {"full_attention", "sliding_attention"}
        and limits <= _KNOWN_LIMITS | _KNOWN_PATTERNS
    )


def use_attention(transformer: Any, *, packed: bool) -> None:
    """Sets the attention of packed rows, or the one that the model was loaded with.

    It stays set: the backward pass of a model with activation checkpointing runs layers again.

    Raises:
        RuntimeError: the model has an attention that cannot be replaced.
    """
    current = transformer.config._attn_implementation
    if packed:
        from transformers import AttentionInterface

        # Each process has its own table. Not again: compile_layers puts another one there.
        if PACKED not in AttentionInterface().valid_keys():
            AttentionInterface.register(PACKED, packed_attention)
    if packed == (current == PACKED):
        return
    if packed:
        transformer.own_attention = current
    wanted = PACKED if packed else transformer.own_attention
    transformer.set_attn_implementation(wanted)
    if transformer.config._attn_implementation != wanted:
        raise RuntimeError("the model's attention cannot be replaced")


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_row: PackedRow | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within the segments of a packed row, as transformers' `AttentionInterface` asks.

    Settings that only some architectures have (`others`) are ignored; a model that needs one shows
    other numbers to `reading.find_reading`.

    Args:
        query: (1, heads, T, D).
        key, value: (1, heads or fewer, T, D).
        attention_mask: not read; there is none for packed rows.
        sliding_window: how many tokens a token sees, itself included.
        softcap: bound of the scores, smooth, as in Gemma 2.
        packed_row: comes from the model's inputs, through its layers.

    Returns:
        (1, T, heads, D), and no attention weights.

    Raises:
        RuntimeError: packed_row did not come, or a tensor did that is not known here, such as the
            sinks of gpt-oss: in bfloat16 weak ones would not show.
    """
    unknown = {name for name, value in others.items() if isinstance(value, Tensor)}
    if unknown := unknown - {"position_ids"}:
        raise RuntimeError(f"the model's attention also reads {', '.join(sorted(unknown))}")
    if packed_row is None:
        raise RuntimeError("the model's layers do not hand packed_row over to their attention")
    if not softcap and not dropout and has_flash_kernel(query, value):
        output = _by_one_kernel(query[0], key[0], value[0], packed_row, scaling, sliding_window)
        return output[None], None

    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = _Scores(scaling, dropout, sliding_window, softcap)
    outputs = [
        scores.attend(query[:, :, one.own], _seen(key, one), _seen(value, one))
        for one in packed_row.segments
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _seen(states: Tensor, segment: Segment) -> Tensor:
    """Keys or values (1, heads, T, D) of the tokens that a segment sees."""
    own = states[:, :, segment.own]
    if segment.num_keys == segment.num_tokens:
        return own
    return torch.cat([states[:, :, segment.prefix], own], dim=2)


class _Scores(NamedTuple):
    """What an architecture does with the scores of attention."""

    scaling: float | None
    dropout: float
    window: int | None
    cap: float | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention (1, heads, queries, D); the queries are the last of the keys' tokens."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        is_plain_causal = num_queries == num_keys and self.window is None and not self.cap
        mask = None
        if not is_plain_causal:
            later = num_keys - num_queries
            mask = query.new_ones(num_queries, num_keys, dtype=torch.bool).tril(later)
            if self.window is not None:
                mask = mask.triu(later - self.window + 1)
        if self.cap:
            assert mask is not None
            return self._attend_capped(query, key, value, mask)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout,
            scale=self.scaling,
        )

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """With scores that are bounded before the mask, all of them in memory."""
        assert self.cap is not None
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = self.cap * torch.tanh(query @ key.mT * scale / self.cap)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
        return F.dropout(weights.to(query.dtype), self.dropout) @ value


_assumes_gpu: ContextVar[bool] = ContextVar("assumes_gpu", default=False)


@contextlib.contextmanager
def assumed_gpu() -> Iterator[None]:
    """In the block, attention is that of a GPU on any device: for tensors without memory."""
    token = _assumes_gpu.set(True)
    try:
        yield
    finally:
        _assumes_gpu.reset(token)


def _is_flash_device(device: torch.device) -> bool:
    if _assumes_gpu.get():
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_flash_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the device has PyTorch's flash kernel for these (1, heads, T, D)."""
    channels = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and _is_flash_device(query.device)
        and channels == value.shape[-1]
        and channels <= 256
        and channels % 8 == 0
    )


def _by_one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All segments by one call of a flash kernel: (heads, T, D) -> (T, heads, D)."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if len(row.prompt_tokens):
        key, value = _RepeatPrompts.apply(key, value, row)  # type: ignore[no-untyped-call]
    output = varlen_attn(
        query.transpose(0, 1),
        key,
        value,
        row.query_ends,
        row.key_ends,
        row.max_queries,
        row.max_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[0] != key.shape[1],
    )
    return cast(Tensor, output)


class _RepeatPrompts(torch.autograd.Function):
    """Keys and values (T, heads, D) as the segments read them, one after another, (K, heads, D).

    The gradient of an index would be scattered, with atomic additions to the same places.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
        ctx.row = row
        return key.index_select(0, row.key_index), value.index_select(0, row.key_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row = ctx.row
        summed = []
        for grad in grads:
            again = grad.index_select(0, row.second_keys)
            summed.append(grad.index_select(0, row.first_keys))
            summed[-1].index_add_(0, row.prompt_tokens, again)  # no index comes twice
        return (*summed, None)
