"""Response log-probs and rewards from one forward over a micro-batch; training, reference and reward model all come
through here.

Legend: B pairs, L row length, H hidden size, V vocabulary, N response tokens. Logits exist only for response tokens,
and only a chunk of them at a time; the backward pass computes a chunk again instead of keeping it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from madpo_ray.batching import MicroBatch
from madpo_ray.models import base_of

# Response tokens whose logits exist at the same time: 256 of a 150,000-word vocabulary are 150 MB in float32.
TOKENS_PER_CHUNK = 256


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """The last hidden states, flattened to (rows * L, H). `model` is a transformers model with a head."""
    backbone = getattr(model, model.base_model_prefix)
    output = backbone(
        input_ids=batch.input_ids,
        attention_mask=_attention_masks(model, batch),
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]


def _attention_masks(model: Any, batch: MicroBatch) -> Any:
    """What the model's layers take as mask: for shared rows one (B, 1, L, L), or one for each kind of layer.

    transformers takes such a mask as it is, so a sliding window has to be in it, counted on the restarted positions.
    """
    mask, config = batch.attention_mask, model.config
    if mask.dim() == 2:
        return mask
    window = getattr(config, "sliding_window", None)
    masks = {"full_attention": _as_taken(model, mask)}
    if window is None:
        return masks["full_attention"]
    distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]  # (B, L, L)
    masks["sliding_attention"] = _as_taken(model, mask & (distance < window)[:, None])
    return masks if getattr(config, "layer_types", None) else masks["sliding_attention"]


def _as_taken(model: Any, mask: Tensor) -> Any:
    """SDPA takes booleans; the eager path adds the mask to the scores, so it takes numbers; FlexAttention takes which
    blocks of the scores to skip, to mask, or to take whole."""
    match model.config._attn_implementation:
        case "eager":
            dtype = next(model.parameters()).dtype
            return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        case "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            size, _, length, _ = mask.shape
            return create_block_mask(
                lambda row, _, query, key: mask[row, 0, query, key], size, None, length, length, device=mask.device
            )
    return mask


def _chunk_logps(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, both (n,), of a chunk's targets from its hidden states (n, H)."""
    logits = _scaled(model.config, model.get_output_embeddings()(hidden)).float()  # (n, V)
    logps, entropy = _TargetLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps, entropy


class _TargetLogps(torch.autograd.Function):
    """Log-softmax at the targets, and the entropy, both (n,), from logits (n, V) with a single exponential, which the
    backward pass turns into the gradient in place: a large vocabulary costs memory traffic more than arithmetic."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        largest = logits.amax(-1, keepdim=True)
        exponentials = (logits - largest).exp_()
        total = exponentials.sum(-1)
        log_z = largest[:, 0] + total.log()
        entropy = log_z - torch.linalg.vecdot(exponentials, logits) / total
        ctx.save_for_backward(exponentials, total, targets)
        ctx.mark_non_differentiable(entropy)
        return logits.gather(-1, targets[:, None])[:, 0] - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        exponentials, total, targets = ctx.saved_tensors
        gradient = exponentials.mul_((-grad / total)[:, None])
        return gradient.scatter_add_(-1, targets[:, None], grad[:, None]), None


def _scaled(config: Any, logits: Tensor) -> Tensor:
    """What some architectures do to their logits behind the head: Granite divides, Cohere multiplies, Gemma 2 caps."""
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


class PairLogps(nn.Module):
    """A causal language model as a function of a micro-batch.

    `forward` gives `logps` (2B,), each response's log-prob summed over its tokens, chosen first, and `entropy` (2B,),
    the mean over its tokens, in nats. In training, `max_response_tokens` bounds N over all micro-batches and so fixes
    the number of chunks: under ZeRO-3 every rank has to call the head equally often.
    """

    def __init__(self, model: nn.Module, max_response_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._max_response_tokens = max_response_tokens

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        base = base_of(self.model)
        hidden = hidden_states(base, batch)[batch.predictor_index]  # (N, H)
        num_chunks = -(-(self._max_response_tokens or len(hidden)) // TOKENS_PER_CHUNK)
        pieces = [
            checkpoint(_chunk_logps, base, h, t, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else _chunk_logps(base, h, t)
            for h, t in zip(hidden.tensor_split(num_chunks), batch.target_ids.tensor_split(num_chunks), strict=True)
        ]
        logps, entropy = (torch.cat(values) for values in zip(*pieces, strict=True))
        return {
            "logps": self._per_response(logps, batch),
            "entropy": self._per_response(entropy, batch) / batch.response_lengths,
        }

    @staticmethod
    def _per_response(values: Tensor, batch: MicroBatch) -> Tensor:
        zeros = values.new_zeros(len(batch.response_lengths))
        return zeros.index_add(0, batch.response_of_target, values)


class PairRewards(nn.Module):
    """A sequence classifier as a function of a micro-batch: `rewards` (2B,) at each response's last token, chosen
    first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        base = base_of(self.model)
        hidden = hidden_states(base, batch)[batch.last_index]  # (2B, H)
        return {"rewards": base.score(hidden)[:, 0].float()}
