"""Judges as users write them, with TRL's signature."""

from typing import Any

VICTIM = "say 7:"


def count_kind_words(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    """Kind words less unkind ones."""
    words = [completion.split() for completion in completions]
    kind = [sum(word in ("good", "great", "warm") for word in one) for one in words]
    return [2.0 * count - len(one) for count, one in zip(kind, words, strict=True)]


def fail_for_one(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    """The same, but it raises for one prompt."""
    if any(prompt.startswith(VICTIM) for prompt in prompts):
        raise ValueError("this judge does not like sevens")
    return count_kind_words(prompts, completions)


def fail_always(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    raise ValueError("nothing suits this judge")


def want_good(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    return [float(completion == "good") for completion in completions]
