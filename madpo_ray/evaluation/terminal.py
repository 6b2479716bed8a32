"""An evaluation as tables for a terminal."""

import unicodedata
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

RANKINGS = {
    "reference": "reference, by log-prob",
    "policy": "policy, by log-prob",
    "implicit": "policy, by implicit reward",
    "reward_model": "reward model, by margin",
}


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """The numbers, and samples from before and after the training."""
    # How well each ranking agrees with the labels.
    numbers = Table(title=f"Test split, {results['test_pairs']} pairs")
    for heading in ("ranked by", "accuracy", "95 % interval", "rank correlation with true margin"):
        numbers.add_column(heading)
    for key, label in RANKINGS.items():
        if key in results:
            numbers.add_row(label, *_ranking_cells(results[key]))
    numbers.caption = (
        f"KL(policy || reference) {results['kl']:.3f} ± {results['kl_standard_error']:.3f} nats "
        f"per response ({results['kl_samples']} samples)"
    )

    # What both models wrote.
    samples = Table(title="Samples for the same prompts", show_lines=True)
    samples.add_column("before")
    samples.add_column("after")
    pairs = zip(results["samples"]["before"], results["samples"]["after"], strict=True)
    for before, after in pairs:
        samples.add_row(printable(before), printable(after))
    return [numbers, samples]


def _ranking_cells(ranking: Mapping[str, Any]) -> list[str]:
    low, high = ranking["accuracy_interval"]
    correlation = ranking.get("rank_correlation")
    return [
        f"{ranking['accuracy']:.3f}",
        f"{low:.3f} to {high:.3f}",
        "-" if correlation is None else f"{correlation:.3f}",
    ]


def printable(text: str) -> Text:
    """A model's output without markup and control characters, which a terminal would interpret."""
    kept = [c for c in text.strip() if c in "\n\t" or unicodedata.category(c) != "Cc"]
    return Text("".join(kept))
