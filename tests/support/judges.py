"""Judges as users write them, with TRL's signature."""

import os
import time
from pathlib import Path
from typing import Any

from support.faults import arm

VICTIM = "say 7:"
# A folder that `note_prompts` and `fill_disk_once` write to, in the environment of Ray's workers.
NOTES = "TEST_NOTES"


def count_kind_words(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    """Kind words less unkind ones."""
    words = [completion.split() for completion in completions]
    kind = [sum(word in ("good", "great", "warm") for word in one) for one in words]
    return [2.0 * count - len(one) for count, one in zip(kind, words, strict=True)]


def note_prompts(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    """The same; every call's prompts are appended to `scored.txt`. Waits while `hold` is there."""
    while (Path(os.environ[NOTES]) / "hold").exists():
        time.sleep(0.02)
    with (Path(os.environ[NOTES]) / "scored.txt").open("a") as stream:
        stream.write("".join(f"{prompt}\n" for prompt in prompts))
    return count_kind_words(prompts, completions)


def fill_disk_once(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    """The same; the first process that calls it finds the disk full when it writes."""
    folder = Path(os.environ[NOTES])
    if not (folder / "full").exists():
        (folder / "full").touch()
        arm(folder.parent, 1, "disk full")  # the chunk of scores is moved into its place
    return count_kind_words(prompts, completions)


def fail_for_one(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    """The same, but it raises for one prompt."""
    if any(prompt.startswith(VICTIM) for prompt in prompts):
        raise ValueError("this judge does not like sevens")
    return count_kind_words(prompts, completions)


def fail_always(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    raise ValueError("nothing suits this judge")


def want_good(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
    return [float(completion == "good") for completion in completions]
