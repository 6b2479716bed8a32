"""What stage pairs prints."""

from typing import Any

from madpo_ray.stages.pairs_summary import describe


def test_description_has_few_lines() -> None:
    """The tenth is for all other reasons."""
    results: dict[str, Any] = {
        "pairs": {"train": 1, "validation": 1, "test": 1},
        "template_unused": False,
        "cut_responses": {"train": 0, "validation": 0, "test": 0},
        "repeated_prompts": 0,
        "quoted_prompts": 0,
        "files_without_pairs": [],
        "duplicates": 0,
        "contradictions": 0,
        "left_out": {"a tie": 0},
        "rejects": {f"reason {i}": 20 - i for i in range(15)},
    }
    lines = list(describe(results))
    assert lines[1] == "195 rows rejected, listed in rejects.parquet:"
    assert lines[2] == "  20 x reason 0"
    assert lines[-1] == "  51 for 6 other reasons"
    assert len(lines) == 12

    results["files_without_pairs"] = [f"{i}.jsonl" for i in range(7)]
    shown = "7 files have no usable pair: 0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl, ..."
    assert list(describe(results))[1] == shown


def test_what_the_config_leaves_out() -> None:
    results = {
        "pairs": {"train": 5},
        "template_unused": True,
        "cut_responses": {"train": 0},
        "repeated_prompts": 0,
        "quoted_prompts": 0,
        "files_without_pairs": [],
        "duplicates": 3,
        "contradictions": 2,
        "left_out": {"a tie": 4, "too long": 0},
        "rejects": {},
    }
    assert list(describe(results)) == [
        "5 train pairs",
        "the pairs are texts and are read as they are, without the model's chat template; a chat "
        "is given as messages",
        "3 pairs repeat an earlier pair word for word",
        "2 pairs also occur with chosen and rejected swapped",
        "left out: 4 x a tie",
    ]
