"""What stage pairs says: pairs by split, what was changed in them, what is left out and why."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray import columns
from madpo_ray.config import DataConfig
from madpo_ray.data.responses import TIE
from madpo_ray.data.tokens import TOO_LONG
from madpo_ray.stages.stage import Description

MAX_REASONS = 10  # on the terminal
MAX_FILES = 5  # likewise


def describe(results: Mapping[str, Any]) -> Description:
    """Pairs by split, what was changed in them, and rejects by reason."""
    lines = [f"{_by_split(results['pairs'])} pairs"]
    if results["template_unused"]:
        lines.append(
            "the pairs are texts and are read as they are, without the model's chat template; a "
            "chat is given as messages"
        )
    if any(results["cut_responses"].values()):
        lines.append(f"responses cut at data.max_length: {_by_split(results['cut_responses'])}")
    if results["repeated_prompts"]:
        lines.append(
            f"{results['repeated_prompts']} pairs repeated the prompt in both responses; it was "
            "removed there"
        )
    if results["quoted_prompts"]:
        lines.append(
            f"{results['quoted_prompts']} pairs begin with the prompt in one response, or with a "
            "prompt of one short word in both; they are kept as they are"
        )
    repeated = {
        "repeat an earlier pair word for word": results["duplicates"],
        "also occur with chosen and rejected swapped": results["contradictions"],
    }
    lines += [f"{count} pairs {what}" for what, count in repeated.items() if count]
    lines += [f"left out: {count} x {why}" for why, count in results["left_out"].items() if count]
    if files := results["files_without_pairs"]:
        shown = ", ".join(files[:MAX_FILES]) + (", ..." if len(files) > MAX_FILES else "")
        lines.append(f"{len(files)} files have no usable pair: {shown}")
    rejects = Counter(results["rejects"])
    if rejects:
        lines.append(f"{rejects.total()} rows rejected, listed in rejects.parquet:")
        lines += _reason_lines(rejects)
    return lines


def _by_split(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())


def left_out_kinds(data: DataConfig) -> list[str]:
    """The kinds of reason for which pairs are left out and do not count as rejected."""
    return [TIE, TOO_LONG] if data.over_length == "drop" else [TIE]


def add_first_rejects(checked: pa.Table, first: dict[str, str]) -> None:
    """Adds where the first row of each kind of reason is, of a table of checked rows."""
    rejected = checked.filter(pc.is_valid(checked[columns.REASON_KIND]))
    for kind, row in zip(
        rejected[columns.REASON_KIND].to_pylist(),
        rejected.select([columns.FILE, columns.ROW]).to_pylist(),
        strict=True,
    ):
        first.setdefault(kind, f"row {row[columns.ROW]} of {row[columns.FILE]}")


def _reason_lines(rejects: "Counter[str]") -> list[str]:
    common = rejects.most_common(MAX_REASONS)
    lines = [f"  {count} x {reason}" for reason, count in common]
    if len(rejects) > MAX_REASONS:
        rest = rejects.total() - sum(count for _, count in common)
        lines[-1] = f"  {rest + common[-1][1]} for {len(rejects) - MAX_REASONS + 1} other reasons"
    return lines
