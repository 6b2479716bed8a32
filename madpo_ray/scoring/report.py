"""What there is to know of scored margins: their spread, the weights that follow, what stands out.

Legend: N pairs of a split.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from madpo_ray.scoring.calibration import are_right, grouped_interval
from madpo_ray.scoring.scaling import Margins

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MARGIN_BINS = 10
HISTOGRAM_BINS = 60
# What a mean weight may differ from 1, and an error of calibration be, without an alarm.
ALLOWED_WEIGHT = 0.02
ALLOWED_ERROR = 0.05


def describe_margins(margins: Margins) -> dict[str, Any]:
    """Count, mean, spread and share of negative ones of margins (N,)."""
    if len(margins) == 0:
        return {"pairs": 0}
    return {
        "pairs": len(margins),
        "mean": float(margins.mean()),
        "standard_deviation": float(margins.std()),
        "quantiles": {f"{share:g}": float(np.quantile(margins, share)) for share in QUANTILES},
        "negative_fraction": float(np.mean(margins < 0)),
    }


def margin_histogram(margins: Margins) -> dict[str, list[float]]:
    """Pairs by margin (N,), N > 0; margins beyond the outermost 0.2 % are in the last bins."""
    low, high = np.quantile(margins, (0.002, 0.998))
    padding = 0.05 * (high - low) or 1.0
    bounds = (float(low - padding), float(high + padding))
    counts, edges = np.histogram(np.clip(margins, *bounds), bins=HISTOGRAM_BINS, range=bounds)
    return {"edges": edges.tolist(), "pairs": counts.tolist()}


def describe_weights(weights: Margins) -> dict[str, float]:
    """Mean, bounds and effective sample size (sum w)^2 / sum w^2 of weights (N,), N > 0.

    The mean is 1 for calibrated margins below tau: sigmoid(c h) + sigmoid(-c h) = 1.
    """
    return {
        "mean": float(weights.mean()),
        "min": float(weights.min()),
        "max": float(weights.max()),
        "effective_sample_size": float(weights.sum() ** 2 / (weights**2).sum()),
    }


def find_alarms(
    margins: Margins,
    weights_of: Callable[[Margins], Margins],
    *,
    tau: float,
    calibration: Mapping[str, Any],
) -> list[str]:
    """Sentences about held-out margins (N,) that are not calibrated; empty if they may well be.

    Args:
        weights_of: gives the weights of margins.
        calibration: what `calibration_report` gave.
    """
    inside = margins[np.abs(margins) < tau]
    alarms = (_weight_alarm(inside, weights_of), _error_alarm(len(margins), calibration))
    return [alarm for alarm in alarms if alarm is not None]


def _weight_alarm(inside: Margins, weights_of: Callable[[Margins], Margins]) -> str | None:
    """For margins below tau, (n,), whose mean weight is not 1 (see `describe_weights`).

    It has to be off by more than ALLOWED_WEIGHT, three standard deviations of calibrated margins of
    these sizes, and two wrong signs.
    """
    if len(inside) == 0:
        return None
    mean = weights_of(inside).mean()

    # Calibrated: each sign is right with probability sigmoid(|margin|).
    sizes = np.abs(inside)
    p_right = expit(sizes)
    effects = weights_of(sizes) - weights_of(-sizes)
    deviation = np.sqrt((p_right * (1 - p_right) * effects**2).sum()) / len(inside)
    two_signs = 2 * np.abs(effects).max() / len(inside)
    if abs(mean - 1) <= max(3 * deviation, two_signs, ALLOWED_WEIGHT):
        return None
    size = "large" if mean < 1 else "small"
    return (
        f"ALARM: the mean weight of held-out pairs below tau is {mean:.3f}, not 1 "
        f"(standard deviation {deviation:.3f}): their margins are too {size}"
    )


def _error_alarm(num_pairs: int, calibration: Mapping[str, Any]) -> str | None:
    """For an ECE above ALLOWED_ERROR that chance and two wrong signs do not explain."""
    when = "after" if "ece_after" in calibration else "before"
    error = calibration[f"ece_{when}"]
    chance, deviation = _error_by_chance(calibration[f"reliability_{when}"])
    explained = chance + max(3 * deviation, 2 / num_pairs)
    if error <= max(explained, ALLOWED_ERROR):
        return None
    return (
        f"ALARM: the calibration error (ECE) is {error:.3f}, where chance makes {chance:.3f}: "
        "see pictures/reliability.png and margins.calibration"
    )


def _error_by_chance(bins: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation of the ECE of calibrated margins in such bins.

    The share of right signs in a bin is then normal about its confidence, and the ECE a sum of
    absolute deviations (half-normal).
    """
    pairs = np.array([one["pairs"] for one in bins], dtype=np.float64)
    confidence = np.array([one["confidence"] for one in bins])
    spread = np.sqrt(confidence * (1 - confidence) / pairs) * pairs / pairs.sum()
    mean = np.sqrt(2 / np.pi) * spread.sum()
    deviation = np.sqrt((1 - 2 / np.pi) * (spread**2).sum())
    return float(mean), float(deviation)


def accuracy_by_margin(
    margins: Margins,
    differences: Margins | None = None,
    bins: int = MARGIN_BINS,
    groups: NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """How often the sign is right, for equally many pairs by |margin|, the smallest first.

    Of each bin: bounds of |margin|, pairs, accuracy with its 95 % interval, and the accuracy that
    calibrated margins would have.

    Args:
        differences: whose sign is counted, (N,); None: the margins' own.
        groups: (N,), of which only different ones are independent; None: all pairs are.
    """
    signs = margins if differences is None else differences
    groups = np.arange(len(margins)) if groups is None else groups
    order = np.argsort(np.abs(margins), kind="stable")
    found = []
    for part in np.array_split(order, min(bins, len(margins)) or 1):
        if len(part) == 0:
            continue
        right = are_right(signs[part])
        sizes = np.abs(margins[part])
        found.append(
            {
                "from": float(sizes.min()),
                "to": float(sizes.max()),
                "pairs": len(part),
                "accuracy": float(right.mean()),
                "interval": grouped_interval(right, groups[part]),
                "expected": float(expit(sizes).mean()),
            }
        )
    return found


def most_negative(margins: Margins, count: int) -> list[int]:
    """The places of the most negative margins (N,), the worst first."""
    order = np.argsort(margins, kind="stable")[:count]
    return [int(i) for i in order if margins[i] < 0]
