"""How a model's pairs are read: found at load, by comparing with the model's own forward.

No list of architectures is trusted: a model that does something else with a mask, with positions or
behind its last hidden states gives other numbers here, before it trains on them.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madpo_ray.columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS
from madpo_ray.config import ModelConfig
from madpo_ray.data.batching import collate
from madpo_ray.errors import UserError
from madpo_ray.models.attention import may_share_prefix
from madpo_ray.models.loading import transformer_of

logger = logging.getLogger(__name__)

# What the comparison allows: nats per token, a reward, or a share of a state's root mean square.
# SmolLM2-135M differed by 6e-6 and by 0.09: rounding. A factor left out of Falcon-H1's head: 0.3.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.3}

# Tokens of the prompt, the chosen and the rejected response: the rows differ in length.
_SHAPES = ((5, 3, 6), (2, 7, 4))
_NARROW_WINDOW = 3


class Reading(NamedTuple):
    """How a module turns pairs into log-probs or rewards."""

    shared_prefix: bool  # one row [prompt | chosen | rejected] per pair, else one per response
    own_forward: bool = False  # `ResponseLogps.own_forward`

    def __str__(self) -> str:
        rows = "one row per pair" if self.shared_prefix else "one row per response"
        return f"{rows}, all logits" if self.own_forward else rows


@torch.no_grad()
def find_reading(
    module: Any, device: torch.device, settings: ModelConfig, *, num_responses: int
) -> Reading:
    """The fastest way to read pairs that gives the numbers of the model's own forward.

    Sets `module.own_forward` accordingly, and warns if the way is a slow one. Under ZeRO-3 all
    ranks call this, after DeepSpeed's start.

    Args:
        module: `ResponseLogps` or `ResponseRewards`, in evaluation mode.
        num_responses: of a pair; a single one shares its prompt with nothing.

    Raises:
        UserError: there is no such way.
    """
    transformer = transformer_of(module.model)
    name = transformer.config.model_type
    may_share = num_responses > 1 and may_share_prefix(settings, transformer.config)
    tolerance = TOLERANCES[transformer.dtype]
    pairs = _example_pairs(transformer)
    expected = _expected(module, transformer, pairs, device)
    if not all(values.isfinite().all() for values in expected):
        raise UserError(f"the {name} model's own numbers are not finite: its weights are damaged")

    seen: list[str] = []
    for reading in _candidates(module, may_share=may_share):
        difference = _difference(module, transformer, reading, pairs, expected, device)
        if isinstance(difference, float) and difference <= tolerance:
            if num_responses > 1 and settings.shared_prefix == "auto":
                _warn_if_slow(name, settings, reading, seen)
            return reading
        seen.append(f"{reading}: {difference}")
    raise UserError(
        f"the {name} model cannot be read as it reads a text alone: numbers of short pairs differ "
        f"by more than {tolerance} ({'; '.join(seen)})"
    )


def _candidates(module: Any, *, may_share: bool) -> Iterator[Reading]:
    """Fastest first."""
    for shared_prefix in (True, False) if may_share else (False,):
        for own_forward in (False, True) if hasattr(module, "own_forward") else (False,):
            yield Reading(shared_prefix, own_forward)


def _example_pairs(transformer: Any) -> list[dict[str, list[int]]]:
    """Two pairs of random tokens, none of which has a meaning of its own."""
    architecture = transformer.config.get_text_config()
    named = [value for key, value in architecture.to_dict().items() if key.endswith("_token_id")]
    special = {token for token in named if isinstance(token, int)}
    plain = [token for token in range(min(architecture.vocab_size, 1000)) if token not in special]
    picked = torch.randint(len(plain), (27,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = iter(plain[index] for index in picked)
    names = (PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS)
    return [
        {
            name: list(itertools.islice(ids, length))
            for name, length in zip(names, shape, strict=True)
        }
        for shape in _SHAPES
    ]


def _expected(
    module: Any, transformer: Any, pairs: Sequence[dict[str, list[int]]], device: torch.device
) -> list[Tensor]:
    """The numbers of each text alone, (R * B, K): as the model is, and with narrow windows."""

    def alone() -> Tensor:
        return torch.stack(
            [
                module.comparable_alone(
                    torch.tensor([pair[PROMPT_IDS] + pair[name]], device=device), len(pair[name])
                )
                for name in (CHOSEN_IDS, REJECTED_IDS)
                for pair in pairs
            ]
        )

    return [alone() for _ in _each_window(transformer)]


def _difference(
    module: Any,
    transformer: Any,
    reading: Reading,
    pairs: Sequence[dict[str, list[int]]],
    expected: Sequence[Tensor],
    device: torch.device,
) -> float | str:
    """The largest difference of a number, or what the model raised."""
    if hasattr(module, "own_forward"):
        module.own_forward = reading.own_forward
    batch = collate(pairs, shared_prefix=reading.shared_prefix).to(device)
    largest = 0.0
    try:
        for values, _ in zip(expected, _each_window(transformer), strict=True):
            largest = max(largest, float((module.comparable(batch) - values).abs().max()))
    except torch.OutOfMemoryError:
        raise
    # A model may refuse rows in any way; what it raised is shown if no reading is found.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return largest


def _each_window(transformer: Any) -> Iterator[None]:
    """Once with the model as it is and, if it has windows, once with windows of a few tokens.

    A window of thousands of tokens would not show in short pairs.
    """
    yield
    owners = [transformer.config, transformer.config.get_text_config(), *transformer.modules()]
    windowed = [one for one in owners if isinstance(getattr(one, "sliding_window", None), int)]
    if not windowed:
        return
    widths = [one.sliding_window for one in windowed]
    try:
        for one in windowed:
            one.sliding_window = _NARROW_WINDOW
        yield
    finally:
        for one, width in zip(windowed, widths, strict=True):
            one.sliding_window = width


def _warn_if_slow(name: str, settings: ModelConfig, reading: Reading, seen: Sequence[str]) -> None:
    if reading == Reading(shared_prefix=True):
        return
    reason = f"faster ways differ from its own forward ({'; '.join(seen)})"
    if not seen:
        reason = f"its layers, with {settings.attn_implementation} attention, take no masks of ours"
    logger.warning("%s reads %s: slower, same numbers; %s", name, reading, reason)
