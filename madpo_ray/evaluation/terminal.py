"""An evaluation as tables for a terminal."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
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
        numbers.add_column(heading, overflow="fold")
    for key, label in RANKINGS.items():
        if key in results:
            numbers.add_row(label, *_ranking_cells(results[key]))

    # Samples in numbers.
    sampled = Table(title="Samples for prompts of the test split")
    shown = []
    for heading, cell in SAMPLE_COLUMNS:
        cells = [cell(entry) for entry in results["sampling"]]
        if any(str(one) != "-" for one in cells):  # no judge, no rewards
            sampled.add_column(heading, overflow="fold")
            shown.append(cells)
    for row in zip(*shown, strict=True):
        sampled.add_row(*row)
    compared = _comparison_table(results["comparisons"])

    # What both models wrote.
    samples = Table(title="Samples for the same prompts", show_lines=True)
    samples.add_column("before")
    samples.add_column("after")
    pairs = zip(results["samples"]["before"], results["samples"]["after"], strict=True)
    for before, after in pairs:
        samples.add_row(printable(before), printable(after))
    return [numbers, sampled, *compared, samples]


def _with_interval(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    if value["interval"] is None:
        return f"{value['mean']:.3f}"
    low, high = value["interval"]
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"


def _kl(entry: Mapping[str, Any]) -> str:
    error = entry["kl_standard_error"]
    return f"{entry['kl']:.3f}" + ("" if error is None else f" ± {error:.3f}")


SAMPLE_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str | Text]], ...] = (
    ("policy", lambda entry: printable(entry["policy"])),
    ("temperature", lambda entry: f"{entry['temperature']:g}"),
    ("reward", lambda entry: _with_interval(entry.get("reward"))),
    ("wins against reference", lambda entry: _with_interval(entry.get("win_rate"))),
    ("KL to reference, nats", _kl),
    ("tokens", lambda entry: f"{entry['tokens']:.1f}"),
    ("distinct bigrams", lambda entry: f"{entry['distinct_2']:.2f}"),
)


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The policy against other runs, if there are any."""
    if not comparisons:
        return []
    table = Table(title="This policy against others, on the same prompts")
    for heading in ("against", "temperature", "reward difference", "wins", "at equal length"):
        table.add_column(heading, overflow="fold")
    for one in comparisons:
        controlled = one["length_controlled_win_rate"]
        table.add_row(
            printable(one["against"]),
            f"{one['temperature']:g}",
            _with_interval(one["reward_difference"]),
            _with_interval(one["win_rate"]),
            "-" if controlled is None else f"{controlled:.3f}",
        )
    return [table]


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
