"""Pictures of margins and samples, as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from madpo_ray.scoring.scaling import Margins

BLUE = "#4477aa"
RED = "#cc6677"
GRAY = "#999999"
BINS = 60
DPI = 120


def draw_margins(
    margins: Margins, weight: Callable[[Margins], Margins] | None, title: str, file: Path
) -> None:
    """A histogram of margins (N,), with the curve of the weight over it.

    Args:
        weight: of margins; None for no curve.
    """
    figure, axes = _figure(title)
    low, high = np.quantile(margins, (0.002, 0.998))
    padding = 0.05 * (high - low) or 1.0
    bounds = (low - padding, high + padding)
    axes.hist(np.clip(margins, *bounds), bins=BINS, range=bounds, color=BLUE)
    axes.axvline(0, color=GRAY, linewidth=1)
    axes.set_xlim(*bounds)
    axes.set_xlabel("margin, in calibrated units")
    axes.set_ylabel("pairs")
    if weight is not None:
        at = np.linspace(*bounds, 500)
        right = axes.twinx()
        right.plot(at, weight(at), color=RED)
        right.set_ylim(bottom=0)
        right.set_ylabel("weight of a pair", color=RED)
    _save(figure, file)


def draw_reliability(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], file: Path
) -> None:
    """How often the sign is right at each confidence, before and after calibration.

    Args:
        before, after: bins, as `scoring.calibration.reliability` gives them.
    """
    figure, axes = _figure("Reliability of the margins' signs, validation pairs")
    axes.plot([0.5, 1], [0.5, 1], color=GRAY, linestyle="--", label="calibrated")
    for bins, color, label in ((before, RED, "before"), (after, BLUE, "after")):
        if bins:
            _errorbar(axes, [one["confidence"] for one in bins], bins, color, label)
    axes.set_xlabel("confidence: sigmoid(|margin|)")
    axes.set_ylabel("share of pairs whose margin is positive")
    axes.legend()
    _save(figure, file)


def draw_accuracy(bins: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """How often the sign is right by size of the margin.

    Args:
        bins: as `scoring.report.accuracy_by_margin` gives them.
    """
    figure, axes = _figure(title)
    places = range(len(bins))
    _errorbar(axes, places, bins, BLUE, "measured")
    axes.plot(places, [one["expected"] for one in bins], "o", color=GRAY, label="if calibrated")
    axes.set_xticks(list(places), [f"{one['to']:.2g}" for one in bins])
    axes.set_xlabel("|margin| up to; equally many pairs each")
    axes.set_ylabel("share of pairs whose margin is positive")
    axes.legend()
    _save(figure, file)


def draw_rewards(entries: Sequence[dict[str, Any]], file: Path) -> None:
    """The mean reward of each policy's samples by temperature, with its interval.

    Args:
        entries: as `samples.describe_samples` gives them.
    """
    figure, axes = _figure("Mean reward of samples")
    for name, own in _by_policy(entries).items():
        means, errors = _means(own)
        at = [entry["temperature"] for entry in own]
        axes.errorbar(at, means, errors, label=name, marker="o", capsize=3)
    axes.set_xlabel("temperature of decoding")
    axes.set_ylabel("reward, 95 % interval over prompts")
    axes.legend()
    _save(figure, file)


def draw_frontier(entries: Sequence[dict[str, Any]], file: Path) -> None:
    """The mean reward against the divergence from the reference; the frontier is connected."""
    figure, axes = _figure("Reward against divergence")
    for name, own in _by_policy(entries).items():
        means, errors = _means(own)
        at = [entry["kl"] for entry in own]
        axes.errorbar(at, means, errors, label=name, marker="o", linestyle="none", capsize=3)
        for x, y, entry in zip(at, means, own, strict=True):
            axes.annotate(f" {entry['temperature']:g}", (x, y), fontsize=8)
    best = sorted((e for e in entries if e["on_frontier"]), key=lambda e: float(e["kl"]))
    kls = [entry["kl"] for entry in best]
    rewards = [entry["reward"]["mean"] for entry in best]
    axes.plot(kls, rewards, color=GRAY, linewidth=1, zorder=0)
    axes.set_xlabel("KL(policy || reference), nats per response; numbers: temperature")
    axes.set_ylabel("reward, 95 % interval over prompts")
    axes.legend()
    _save(figure, file)


def _by_policy(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each policy's entries by temperature."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: float(entry["temperature"])):
        found.setdefault(entry["policy"], []).append(entry)
    return found


def _means(entries: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean rewards, and how far their intervals go below and above."""
    means = np.array([entry["reward"]["mean"] for entry in entries])
    intervals = [entry["reward"]["interval"] or [entry["reward"]["mean"]] * 2 for entry in entries]
    low, high = np.array(intervals).T
    return means, np.maximum([means - low, high - means], 0)


def _errorbar(
    axes: Axes, at: Sequence[float], bins: Sequence[dict[str, Any]], color: str, label: str
) -> None:
    """Accuracies with their intervals."""
    accuracy = np.array([one["accuracy"] for one in bins])
    low, high = np.array([one["interval"] for one in bins]).T
    errors = np.maximum([accuracy - low, high - accuracy], 0)
    axes.errorbar(at, accuracy, errors, color=color, label=label, marker="o", capsize=3)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
