"""How a model reads pairs: found at load, by comparing with the model's own forward.

No list of architectures is trusted: a model that does something else with a mask, with positions or
after its last hidden states gives other numbers here, before it trains on them.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from madpo_ray.columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS
from madpo_ray.config import ModelConfig
from madpo_ray.data.batching import MicroBatch, collate
from madpo_ray.errors import UserError
from madpo_ray.models.attention import may_pack
from madpo_ray.models.compiling import compile_layers
from madpo_ray.models.devices import is_spread
from madpo_ray.models.loading import transformer_of

logger = logging.getLogger(__name__)

# What the comparison allows: nats per token, a reward, or a share of a state's root mean square.
# Rounding made SmolLM2-135M differ by 3e-6 and 0.01; a factor left out after Falcon-H1's head is
# 0.3.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}

# Tokens of the prompt, the chosen and the rejected response: the rows differ in length, and the
# responses are long enough for rounding to cancel in their means.
SHAPES = ((9, 24, 32), (4, 40, 28))
NARROW_WINDOW = 3


@dataclass(frozen=True)
class Reading:
    """How a module turns pairs into log-probs or rewards."""

    packed: bool  # one row for all pairs of a micro-batch, else one per response, padded
    own_forward: bool = False  # all logits from the model's complete forward
    note: str = field(default="", compare=False)  # why it is a slow way; empty if it is not

    def __str__(self) -> str:
        rows = "packed rows" if self.packed else "one row per response"
        return f"{rows}, all logits" if self.own_forward else rows


@torch.no_grad()
def find_reading(
    module: Any,
    device: torch.device,
    settings: ModelConfig,
    largest: Callable[[float], float] = float,
) -> Reading:
    """The fastest way to read pairs that gives the numbers of the model's own forward.

    Sets `module.own_forward` accordingly, and the module in evaluation mode; compiles its layers if
    the settings ask for that. Under ZeRO-3 all ranks call this, after DeepSpeed's start.

    Args:
        module: `ResponseLogps` or `ResponseRewards`.
        largest: a number of this process to the largest of all ranks, so that all choose alike.

    Raises:
        UserError: there is no such way, the model's own numbers are not finite, or later tokens
            change them.
    """
    module.eval()
    transformer = transformer_of(module.model)
    name = transformer.config.model_type
    tolerance = TOLERANCES[transformer.dtype]
    pairs = _example_pairs(transformer)

    # What the model itself says of each text: as it is, and with narrow windows. A window of
    # thousands of tokens would not show in short pairs.
    expected = [_own_numbers(module, pairs, device)]
    if _window_owners(transformer):
        with _narrow_windows(transformer):
            expected.append(_own_numbers(module, pairs, device))
    if not all(numbers.isfinite().all() for numbers in expected):
        raise UserError(f"the {name} model's own numbers are not finite: its weights are damaged")

    # Tokens that come later must not matter.
    if not _is_causal(module, pairs[0], tolerance, device):
        raise UserError(
            f"the {name} model sees the tokens after the one that it predicts: it is not a "
            "causal language model"
        )

    # The first way that agrees.
    seen: list[str] = []
    for reading in _candidates(module, may_be_packed=may_pack(settings, transformer.config)):
        if hasattr(module, "own_forward"):
            module.own_forward = reading.own_forward
        batch = collate(pairs, packed=reading.packed).to(device)
        difference = _difference(module, transformer, batch, expected)
        if largest(difference if isinstance(difference, float) else math.inf) <= tolerance:
            if settings.torch_compile and not is_spread(transformer):
                compile_layers(transformer)
                _require_same(module, transformer, batch, expected, tolerance)
            return _with_note(reading, name, seen) if settings.packed_rows == "auto" else reading
        seen.append(f"{reading}: {difference}")
    raise UserError(
        f"the {name} model gives other numbers in a batch than for a text alone, so it cannot be "
        f"trained or scored (differences: {'; '.join(seen)}; allowed: {tolerance})"
    )


@torch.no_grad()
def require_no_dropout(module: Any, device: torch.device, reading: Reading) -> None:
    """Raises UserError if the module's numbers in training mode are not those in evaluation mode.

    The reference was scored without dropout, so a policy that kept some would differ from it before
    its first step. Leaves the module in evaluation mode.
    """
    transformer = transformer_of(module.model)
    batch = collate(_example_pairs(transformer), packed=reading.packed).to(device)
    numbers = []
    for is_training in (True, False):
        module.train(is_training)
        numbers.append(module.numbers_to_compare(batch))
    difference = _distance(*numbers)
    # The same forward twice: hardly any rounding differs.
    if not difference <= TOLERANCES[transformer.dtype] / 100:
        name = transformer.config.model_type
        raise UserError(
            f"the {name} model computes other numbers in training (they differ by {difference:.2g})"
            " although disable_dropout is set: set what its config.json says of dropout to 0, or "
            "disable_dropout: false"
        )


def _candidates(module: Any, *, may_be_packed: bool) -> Iterator[Reading]:
    """Fastest first."""
    forwards = [False, True] if hasattr(module, "own_forward") else [False]
    if may_be_packed:
        for own_forward in forwards:
            yield Reading(packed=True, own_forward=own_forward)
    for own_forward in forwards:
        yield Reading(packed=False, own_forward=own_forward)


def _example_pairs(transformer: Any) -> list[dict[str, list[int]]]:
    """Two pairs of random tokens, none of which the config names."""
    architecture = transformer.config.get_text_config()
    named = [value for key, value in architecture.to_dict().items() if key.endswith("_token_id")]
    special = {token for token in named if isinstance(token, int)}
    plain = [token for token in range(min(architecture.vocab_size, 1000)) if token not in special]
    generator = torch.Generator().manual_seed(0)

    pairs = []
    for shape in SHAPES:
        pair = {}
        for name, length in zip((PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS), shape, strict=True):
            picked = torch.randint(len(plain), (length,), generator=generator)
            pair[name] = [plain[index] for index in picked.tolist()]
        pairs.append(pair)
    return pairs


def _own_numbers(
    module: Any, pairs: Sequence[dict[str, list[int]]], device: torch.device
) -> Tensor:
    """Of each text by itself, (R * B, K), chosen responses first."""
    numbers = []
    for name in (CHOSEN_IDS, REJECTED_IDS):
        for pair in pairs:
            ids = torch.tensor([pair[PROMPT_IDS] + pair[name]], device=device)
            numbers.append(module.own_numbers(ids, len(pair[name])))
    return torch.stack(numbers)


def _is_causal(
    module: Any, pair: dict[str, list[int]], tolerance: float, device: torch.device
) -> bool:
    """Whether a prediction is the same with more tokens after it."""
    text = pair[PROMPT_IDS] + pair[CHOSEN_IDS]
    alone, followed = (
        module.own_prediction(torch.tensor([ids], device=device), len(text) - 1)
        for ids in (text, text + pair[REJECTED_IDS])
    )
    return _distance(followed[None], alone[None]) <= tolerance


def _distance(found: Tensor, expected: Tensor) -> float:
    """Of numbers (R * B, K): the largest over the responses; NaN if one is not finite.

    Over the K numbers of a response the root mean square: single channels of a state are large.
    """
    distance = (found - expected).square().mean(-1).sqrt().max()
    return float(distance) if distance.isfinite() else math.nan


def _difference(
    module: Any, transformer: Any, batch: MicroBatch, expected: Sequence[Tensor]
) -> float | str:
    """The largest difference of a response's numbers, or what the model raised."""
    try:
        found = [module.numbers_to_compare(batch)]
        if len(expected) > 1:
            with _narrow_windows(transformer):
                found.append(module.numbers_to_compare(batch))
    except torch.OutOfMemoryError:
        raise
    # A model may refuse rows in any way; what it raised is shown if no way is found.
    except Exception as error:
        return f"{type(error).__name__}: {error}"

    distances = [_distance(one, own) for one, own in zip(found, expected, strict=True)]
    return "not finite" if any(map(math.isnan, distances)) else max(distances)


def _require_same(
    module: Any,
    transformer: Any,
    batch: MicroBatch,
    expected: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Raises UserError if compiled layers give other numbers."""
    difference = _difference(module, transformer, batch, expected)
    if not (isinstance(difference, float) and difference <= tolerance):
        name = transformer.config.model_type
        raise UserError(
            f"the {name} model's compiled layers give other numbers ({difference}; allowed: "
            f"{tolerance}): remove model.torch_compile"
        )


def _window_owners(transformer: Any) -> list[Any]:
    owners = [transformer.config, transformer.config.get_text_config(), *transformer.modules()]
    return [one for one in owners if isinstance(getattr(one, "sliding_window", None), int)]


@contextlib.contextmanager
def _narrow_windows(transformer: Any) -> Iterator[None]:
    """Sliding windows of a few tokens, inside the block."""
    owners = _window_owners(transformer)
    widths = [one.sliding_window for one in owners]
    try:
        for one in owners:
            one.sliding_window = NARROW_WINDOW
        yield
    finally:
        for one, width in zip(owners, widths, strict=True):
            one.sliding_window = width


def _with_note(reading: Reading, name: str, seen: Sequence[str]) -> Reading:
    """The reading with the reason why it is a slow one, if it is; also logged."""
    if reading == Reading(packed=True):
        return reading
    reason = f"faster ways differ from its own forward ({'; '.join(seen)})"
    if not seen:
        reason = "its config names layers or limits of attention that packed rows do not know"
    note = f"{name} reads {reading}: slower, same numbers; {reason}"
    logger.warning(note)
    return Reading(reading.packed, reading.own_forward, note)
