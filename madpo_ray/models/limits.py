"""What a model's config.json says that pairs must keep to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo_ray.errors import UserError
from madpo_ray.models.source import read_json


def check_lengths(
    folder: Path, max_length: int, *, key: str = "data.max_length", before: int = 0
) -> None:
    """Raises UserError if a model cannot read `max_length` tokens, or not always alike.

    Args:
        key: of the config, which has to be lowered.
        before: tokens of `max_length` that the key does not count.
    """
    architecture = _text_config(folder)
    positions = architecture.get("max_position_embeddings") or architecture.get("n_positions")
    if positions is not None and max_length > positions:
        raise UserError(
            f"{key}: {max_length} is more than the model's {positions} positions: lower {key} to "
            f"{positions - before}"
        )

    # These scale positions by the longest row of a batch once it exceeds the original length: a
    # pair's log-prob would depend on its neighbours.
    ropes = architecture.get("rope_parameters") or architecture.get("rope_scaling") or {}
    by_layer_type = [one for one in ropes.values() if isinstance(one, dict)]
    for rope in (ropes, *by_layer_type):
        kind = rope.get("rope_type") or rope.get("type")
        if kind not in ("longrope", "dynamic"):
            continue
        original = rope.get("original_max_position_embeddings")
        original = original or architecture.get("original_max_position_embeddings") or positions
        if original is not None and max_length > original:
            raise UserError(
                f"{key}: the model's {kind} positions depend on the longest pair of a batch beyond "
                f"{original} tokens: lower {key} to {original - before}"
            )


def count_embeddings(folder: Path) -> int | None:
    """How many tokens the model has embeddings for."""
    size: int | None = _text_config(folder).get("vocab_size")
    return size


def check_vocabulary(folder: Path, token_ids: Mapping[str, int]) -> None:
    """Raises UserError if the tokenizer has a token that the model has no embedding for."""
    size = count_embeddings(folder)
    beyond = [token for token, number in token_ids.items() if size and number >= size]
    if beyond:
        raise UserError(
            f"the tokenizer's token {beyond[0]!r} has id {token_ids[beyond[0]]}, and the model has "
            f"{size} embeddings ({len(beyond)} such tokens): resize the model's embeddings, or "
            "use the tokenizer that it was trained with"
        )


def _text_config(folder: Path) -> dict[str, Any]:
    """What config.json says of the language model, including models that also read images."""
    config = read_json(folder / "config.json")
    text: dict[str, Any] = config.get("text_config") or config
    return text
