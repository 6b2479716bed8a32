"""Rows in TRL's formats, and rows that are none."""

from typing import Any

import pytest

from madpo_ray.data.formats import BadRowError, parse_pair
from support.pairs import messages

STANDARD = {"prompt": "p", "chosen": " a", "rejected": " b"}
CONVERSATION = messages(prompt="p", chosen="a", rejected="b")


@pytest.mark.parametrize("row", [STANDARD, CONVERSATION])
def test_explicit_prompts_stay_as_they_are(row: dict[str, Any]) -> None:
    assert parse_pair(row) == row


def test_implicit_prompt_of_texts() -> None:
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    expected = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
    assert parse_pair(row) == expected


def test_implicit_prompt_of_messages() -> None:
    row = {
        "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
        "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
    }
    assert parse_pair(row) == CONVERSATION


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen is neither text nor a list"),
        ({"prompt": "p", "chosen": [{"role": "user"}], "rejected": "b"}, "neither text nor"),
        ({"prompt": "p", "chosen": "a"}, "rejected is missing"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({**messages(prompt="p", chosen="a"), "rejected": "b"}, "different kinds"),
        ({"prompt": "p", **messages(chosen="a", rejected="b")}, "different kinds"),
    ],
)
def test_bad_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parse_pair(row)
