"""Tables for a terminal, whatever a model wrote."""

import io
from typing import Any

import pytest
from rich.console import Console

from madpo_ray.evaluation.terminal import evaluation_tables, printable


def results(sample: str) -> dict[str, Any]:
    ranking = {"accuracy": 0.5, "accuracy_interval": (0.4, 0.6)}
    return {
        "test_pairs": 4,
        "reference": ranking,
        "policy": {**ranking, "rank_correlation": 0.321},
        "implicit": ranking,
        "sampling": [
            {
                "policy": "policy",
                "temperature": 0.7,
                "tokens": 3.25,
                "distinct_2": 0.5,
                "kl": 1.0,
                "kl_standard_error": 0.5,
                "reward": {"mean": 2.0, "interval": (1.5, 2.5)},
            },
            {
                "policy": "reference",
                "temperature": 0.7,
                "tokens": 3.0,
                "distinct_2": 0.25,
                "kl": 0.875,
                "kl_standard_error": None,
                "reward": {"mean": 1.0, "interval": None},
            },
        ],
        "comparisons": [
            {
                "against": "other[/y]run",
                "temperature": 0.7,
                "reward_difference": {"mean": -0.125, "interval": (-0.5, 0.25)},
                "win_rate": {"mean": 0.375, "interval": (0.25, 0.5)},
                "length_controlled_win_rate": None,
            }
        ],
        "samples": {"before": [sample], "after": [sample]},
    }


def shown(sample: str) -> str:
    console = Console(file=io.StringIO(), width=160)
    for table in evaluation_tables(results(sample)):
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_shows_what_there_is() -> None:
    text = shown("fine")
    assert "policy, by log-prob" in text
    assert "0.400 to 0.600" in text
    assert "0.321" in text
    assert "0.875" in text
    assert "1.000 ± 0.500" in text
    assert "2.000 (1.500 to 2.500)" in text
    assert "other[/y]run" in text
    assert "-0.125 (-0.500 to 0.250)" in text
    assert "reward model" not in text


@pytest.mark.parametrize("sample", ["[/INST] yes", "[red]x", "[/x]"])
def test_square_brackets_are_text(sample: str) -> None:
    assert shown(sample).count(sample) == 2


def test_control_characters_are_removed() -> None:
    """A terminal would obey them."""
    assert printable("\x1b]0;title\x07a\nb\x9bc").plain == "]0;titlea\nbc"
