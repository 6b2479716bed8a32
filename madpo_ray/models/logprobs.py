"""Log-probs and rewards of responses, from one forward over a micro-batch.

Training, reference and reward model all use these modules.

Legend: B pairs, R responses per pair, L row length, H hidden size, V vocabulary, N response tokens.
Logits exist for response tokens only, a chunk of them at a time; the backward pass computes a chunk
again instead of keeping it.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from madpo_ray.data.batching import MicroBatch
from madpo_ray.models.attention import use_attention
from madpo_ray.models.loading import transformer_of

# Response tokens whose logits exist at the same time, by the device's type: of a 150,000-word
# vocabulary 150 MB and 1.2 GB in float32. A GPU is busy only with larger products, and adds up the
# head's gradient over the chunks in the model's dtype, so that few lose less precision.
TOKENS_PER_CHUNK = {"cpu": 256, "cuda": 2048}


class ResponseLogps(nn.Module):
    """A causal language model as a function of a micro-batch.

    Under ZeRO-3 every rank has to call the head equally often: then `max_response_tokens`
    bounds N over all micro-batches of a run and so fixes the number of chunks.

    Args:
        tokens_per_chunk: response tokens whose logits exist at the same time; None: as many as suit
            the device.

    Attributes:
        own_forward: take all logits from the model's complete forward, with more memory: for models
            that do more after their last hidden states than is known here.
    """

    def __init__(
        self,
        model: nn.Module,
        max_response_tokens: int | None = None,
        tokens_per_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.own_forward = False
        self._max_response_tokens = max_response_tokens
        self._tokens_per_chunk = tokens_per_chunk

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """`logps` (R * B,): each response's log-prob summed over its tokens, in nats.

        `entropy` (R * B,): the mean over its tokens, in nats.
        """
        logps, entropy = self._of_tokens(batch)
        return {
            "logps": sum_per_response(logps, batch),
            "entropy": sum_per_response(entropy, batch) / batch.response_lengths,
        }

    def numbers_to_compare(self, batch: MicroBatch) -> Tensor:
        """Each response's mean log-prob of a token (R * B, 1), in nats."""
        logps: Tensor = self(batch)["logps"]
        return (logps / batch.response_lengths)[:, None]

    def own_numbers(self, ids: Tensor, num_response_tokens: int) -> Tensor:
        """The same of one text's ids (1, L), from the model's own forward: (1,)."""
        use_attention(transformer_of(self.model), packed=False)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logps, _ = target_logps(logits, ids[0, 1:])
        return logps[-num_response_tokens:].mean()[None]

    def own_prediction(self, ids: Tensor, position: int) -> Tensor:
        """The logits (V,) at a position of one text, scaled to a mean square of 1."""
        use_attention(transformer_of(self.model), packed=False)
        return _normalised(self.model(input_ids=ids, use_cache=False).logits[0, position])

    def _of_tokens(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of all response tokens, both (N,)."""
        transformer = transformer_of(self.model)
        if self.own_forward:
            logits = _own_logits(transformer, batch)
            return target_logps(logits.float(), batch.target_ids)
        hidden = _hidden_states(transformer, batch)[batch.predictor_index]  # (N, H)
        chunks = self._chunks(hidden, batch.target_ids)
        pieces = [_recomputed(_chunk_logps, transformer, h, targets) for h, targets in chunks]
        logps, entropies = zip(*pieces, strict=True)
        return torch.cat(logps), torch.cat(entropies)

    def _chunks(self, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Equal parts of the states (N, ...) and targets (N,) of all response tokens."""
        num_tokens = self._max_response_tokens or len(states)
        tokens_per_chunk = self._tokens_per_chunk or TOKENS_PER_CHUNK[states.device.type]
        num_chunks = math.ceil(num_tokens / tokens_per_chunk)
        yield from zip(
            states.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True
        )

    def response_logits(self, batch: MicroBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (n, V) in float32 and targets (n,), of one chunk of tokens after another."""
        transformer = transformer_of(self.model)
        if self.own_forward:
            logits = _own_logits(transformer, batch)
            for part, targets in self._chunks(logits, batch.target_ids):
                yield part.float(), targets
            return
        hidden = _hidden_states(transformer, batch)[batch.predictor_index]
        for states, targets in self._chunks(hidden, batch.target_ids):
            yield _head_logits(transformer, states), targets


def _own_logits(transformer: Any, batch: MicroBatch) -> Tensor:
    """Logits (N, V) of all response tokens, from the model's complete forward."""
    logits: Tensor = transformer(**_inputs(transformer, batch)).logits
    return logits.flatten(0, 1)[batch.predictor_index]


class ResponseRewards(nn.Module):
    """A sequence classifier with one label as a function of a micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """`rewards` (R * B,), each read at its response's last token."""
        return {"rewards": self._rewards(self._last_states(batch))}

    def numbers_to_compare(self, batch: MicroBatch) -> Tensor:
        """Each response's reward, and its last state scaled to a mean square of 1, (R * B, 1 + H).

        The state, since a fresh head gives zeros. The reward counts as much as all of the state.
        """
        states = self._last_states(batch)
        return _reward_and_state(self._rewards(states), states)

    def own_numbers(self, ids: Tensor, num_response_tokens: int) -> Tensor:
        """The same of one text's ids (1, L), from the model's own forward: (1 + H,)."""
        use_attention(transformer_of(self.model), packed=False)
        reward = self.model(input_ids=ids, use_cache=False).logits[0].float()
        return _reward_and_state(reward, self.own_prediction(ids, -1)[None])[0]

    def own_prediction(self, ids: Tensor, position: int) -> Tensor:
        """The last state (H,) at a position of one text, scaled to a mean square of 1."""
        transformer = transformer_of(self.model)
        use_attention(transformer, packed=False)
        states = _last_hidden_state(transformer, {"input_ids": ids, "use_cache": False})
        return _normalised(states[0, position])

    def _last_states(self, batch: MicroBatch) -> Tensor:
        """Hidden states at each response's last token, (R * B, H)."""
        return _hidden_states(transformer_of(self.model), batch)[batch.last_index]

    def _rewards(self, states: Tensor) -> Tensor:
        rewards: Tensor = transformer_of(self.model).score(states)
        return rewards[:, 0].float().to(states.device)


def target_logps(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of logits (n, V) at the targets (n,), and the entropy, both (n,), in nats.

    One exponential of the logits serves log-prob, entropy and gradient: with a large vocabulary
    memory traffic costs more than arithmetic. The entropy carries no gradient.
    """
    logps, entropy = _TargetLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps, entropy


class _TargetLogps(torch.autograd.Function):
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


def _hidden_states(transformer: Any, batch: MicroBatch) -> Tensor:
    """The last hidden states, flattened to (rows * L, H)."""
    return _last_hidden_state(transformer, _inputs(transformer, batch)).flatten(0, 1)


def _last_hidden_state(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    """(rows, L, H), on the inputs' device: the last layer may be on another GPU than the first."""
    backbone = getattr(transformer, transformer.base_model_prefix)
    states: Tensor = backbone(**inputs).last_hidden_state
    return states.to(inputs["input_ids"].device)


def _inputs(transformer: Any, batch: MicroBatch) -> dict[str, Any]:
    """What the model's forward gets; sets the attention that goes with it.

    The model counts the positions of separate rows itself.
    """
    use_attention(transformer, packed=batch.packed_row is not None)
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.packed_row is None:
        return {**inputs, "attention_mask": batch.attention_mask}
    row = batch.packed_row
    return {**inputs, "position_ids": row.position_ids, "packed_row": row}


def _normalised(states: Tensor) -> Tensor:
    """States (..., H) scaled to a mean square of 1, float32."""
    return torch.nn.functional.rms_norm(states.float(), states.shape[-1:])


def _reward_and_state(rewards: Tensor, states: Tensor) -> Tensor:
    """Rewards (n,) and normalised states (n, H) as (n, 1 + H).

    The reward is scaled so that the root mean square of a row is at least the reward's own size.
    """
    scale = (1 + states.shape[-1]) ** 0.5
    return torch.cat([scale * rewards[:, None], _normalised(states)], dim=1)


def _recomputed(function: Any, *arguments: Any) -> Any:
    """Calls the function; the backward pass calls it again instead of keeping its tensors."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _chunk_logps(transformer: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, both (n,), of a chunk's targets from its hidden states (n, H)."""
    return target_logps(_head_logits(transformer, hidden), targets)


def _head_logits(transformer: Any, hidden: Tensor) -> Tensor:
    """Logits (n, V) in float32 of hidden states (n, H), on their device."""
    logits = transformer.get_output_embeddings()(hidden).to(hidden.device)
    return _scaled(transformer.config, logits).float()


def _scaled(architecture: Any, logits: Tensor) -> Tensor:
    """What some architectures do after the head: Granite divides, Cohere multiplies, Gemma caps."""
    if divisor := getattr(architecture, "logits_scaling", None):
        logits = logits / divisor
    if factor := getattr(architecture, "logit_scale", None):
        logits = logits * factor
    if cap := getattr(architecture, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def sum_per_response(values: Tensor, batch: MicroBatch) -> Tensor:
    """Values of tokens (N,) summed over each response, (R * B,)."""
    zeros = values.new_zeros(len(batch.response_lengths))
    return zeros.index_add(0, batch.response_of_target, values)
