"""Random pairs of token ids, and their log-probs by plain forwards, one text at a time."""

from typing import Any

import torch

from madpo_ray.models.attention import use_attention
from madpo_ray.models.loading import transformer_of

_GENERATOR = torch.Generator().manual_seed(3)


def _random_ids(low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (), generator=_GENERATOR))
    ids: list[int] = torch.randint(3, 400, (length,), generator=_GENERATOR).tolist()
    return ids


PAIRS = [
    {
        "prompt_ids": _random_ids(1, 20),
        "chosen_ids": _random_ids(1, 12),
        "rejected_ids": _random_ids(1, 12),
    }
    for _ in range(5)
]


def separate_logp(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-prob of a response, from full logits of one unpadded row."""
    use_attention(transformer_of(model), packed=False)
    ids = torch.tensor([prompt + response])
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    own: torch.Tensor = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
    return own.sum()


def separate_logps(model: Any) -> torch.Tensor:
    """Of all responses of PAIRS, chosen first."""
    return torch.stack(
        [
            separate_logp(model, pair["prompt_ids"], pair[side])
            for side in ("chosen_ids", "rejected_ids")
            for pair in PAIRS
        ]
    )
