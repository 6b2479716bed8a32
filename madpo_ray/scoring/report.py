"""What there is to know of scored margins: their spread, the weights that follow, what stands out.

Legend: N pairs of a split.
"""

from typing import Any

import numpy as np
from scipy.special import expit

from madpo_ray.scoring.calibration import count_right, interval
from madpo_ray.scoring.scaling import Margins

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MARGIN_BINS = 10
HISTOGRAM_BINS = 60


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


def accuracy_by_margin(
    margins: Margins, differences: Margins | None = None, bins: int = MARGIN_BINS
) -> list[dict[str, Any]]:
    """How often the sign is right, for equally many pairs by |margin|, the smallest first.

    Of each bin: bounds of |margin|, pairs, accuracy with its 95 % interval, and the accuracy that
    calibrated margins would have.

    Args:
        differences: whose sign is counted, (N,); None: the margins' own.
    """
    signs = margins if differences is None else differences
    order = np.argsort(np.abs(margins), kind="stable")
    found = []
    for part in np.array_split(order, min(bins, len(margins)) or 1):
        if len(part) == 0:
            continue
        num_right = count_right(signs[part])
        sizes = np.abs(margins[part])
        found.append(
            {
                "from": float(sizes.min()),
                "to": float(sizes.max()),
                "pairs": len(part),
                "accuracy": num_right / len(part),
                "interval": interval(num_right, len(part)),
                "expected": float(expit(sizes).mean()),
            }
        )
    return found


def most_negative(margins: Margins, count: int) -> list[int]:
    """The places of the most negative margins (N,), the worst first."""
    order = np.argsort(margins, kind="stable")[:count]
    return [int(i) for i in order if margins[i] < 0]
