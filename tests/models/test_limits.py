"""What pairs must keep to."""

import re
from pathlib import Path
from typing import Any

import pytest

from madpo_ray.errors import UserError
from madpo_ray.models.limits import check_lengths, check_vocabulary
from support.models import edited


@pytest.mark.parametrize(
    ("config", "max_length", "message"),
    [
        ({"max_position_embeddings": 64}, 65, "65 is more than the model's 64 positions"),
        ({"max_position_embeddings": 64}, 64, None),
        ({"max_position_embeddings": None, "n_positions": 64}, 65, "64 positions"),
        ({"text_config": {"max_position_embeddings": 64}}, 65, "64 positions"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 32,
                }
            },
            33,
            "lower data.max_length to 32",
        ),
        (  # by kind of layer
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {
                        "rope_type": "longrope",
                        "original_max_position_embeddings": 32,
                    },
                }
            },
            33,
            "lower data.max_length to 32",
        ),
        ({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 64}, 64, None),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 16},
            17,
            "longrope positions depend on the longest pair of a batch",
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}},
            17,
            None,
        ),
    ],
)
def test_lengths_fit_the_model(
    config: dict[str, Any],
    max_length: int,
    message: str | None,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    """And a pair's log-prob may not depend on its neighbours."""
    base = {"rope_parameters": None, "rope_scaling": None}
    edited(model_folder, tmp_path / "m", **{**base, **config})
    if message is None:
        check_lengths(tmp_path / "m", max_length)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        check_lengths(tmp_path / "m", max_length)


def test_vocabulary_fits_the_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    edited(model_folder, tmp_path / "m", vocab_size=10)
    check_vocabulary(tmp_path / "m", {"a": 0, "b": 9})
    message = "token 'c' has id 10, and the model has 10 embeddings (2 such tokens)"
    with pytest.raises(UserError, match=re.escape(message)):
        check_vocabulary(tmp_path / "m", {"a": 0, "c": 10, "d": 11})
