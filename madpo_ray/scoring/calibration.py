"""How well calibrated the margins are: accuracy, a scaling, and errors before and after it.

A margin h is calibrated if sigmoid(h) is the share of such pairs whose label agrees. Rows are
chosen-oriented, so a pair's label agrees if its margin is positive.

Legend: N pairs.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr, ndtri
from scipy.stats import bootstrap

from madpo_ray.scoring.scaling import TEMPERATURE_BOUNDS, Margins, Method, fit_scaling

FOLDS = 5
RESAMPLES = 999
MAX_RESAMPLED = 10**7  # margins


def are_right(differences: Margins) -> Margins:
    """1 where a difference (N,) is positive, 0.5 where it is a tie, else 0."""
    right: Margins = (differences > 0) + 0.5 * (differences == 0)
    return right


def count_right(differences: Margins) -> float:
    """How many of the differences (N,) are positive. A tie counts one half."""
    return float(are_right(differences).sum())


def interval(successes: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson interval of a share (Wilson 1927); ties make halves of successes."""
    z = float(ndtri(0.975))
    share = successes / count
    center = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def grouped_interval(right: Margins, groups: NDArray[np.int64]) -> tuple[float, float]:
    """`interval` of the mean of `right` (N,), in [0, 1], if only groups are independent.

    It is that of fewer pairs: as many as would vary as much, were all independent (Kish 1965).

    Args:
        groups: (N,) any numbers.
    """
    share = float(right.mean())
    _, index = np.unique(groups, return_inverse=True)
    num_groups = int(index.max()) + 1
    if num_groups == len(right):
        return interval(share * len(right), len(right))
    if num_groups == 1 or right.var() == 0:
        return interval(share * num_groups, num_groups)
    residuals = np.bincount(index, right - share)
    variance = num_groups / (num_groups - 1) * float((residuals**2).sum()) / len(right) ** 2
    count = len(right) if variance == 0 else min(len(right), float(right.var()) / variance)
    return interval(share * count, count)


def expected_calibration_error(margins: Margins, bins: int = 10) -> float:
    """Mean |confidence - accuracy| over equal-width bins of sigmoid(|margin|) in [0.5, 1].

    On chosen-oriented rows the confidence must be that of the margin's sign: comparing
    sigmoid(margin) with an outcome that is always 1 would give 0.30 for a perfect model.
    """
    confidence, index = _confidence_bins(margins, bins)
    gaps = [
        abs(confidence[index == i].sum() - count_right(margins[index == i])) for i in range(bins)
    ]
    return float(np.sum(gaps) / len(margins))


def _confidence_bins(margins: Margins, bins: int) -> tuple[Margins, NDArray[np.int64]]:
    """sigmoid(|margin|), and its place among equal-width bins in [0.5, 1], each (N,)."""
    confidence: Margins = expit(np.abs(margins))
    return confidence, np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)


def brier_score(margins: Margins) -> float:
    """Mean (1 - sigmoid(margin))^2 (Brier 1950)."""
    return float(np.mean(expit(-margins) ** 2))


def reliability(margins: Margins, bins: int = 10) -> list[dict[str, Any]]:
    """The bins of `expected_calibration_error` that have pairs.

    Of each: pairs, their mean confidence, the share whose sign is right, and its 95 % interval.
    """
    confidence, index = _confidence_bins(margins, bins)
    found = []
    for i in np.unique(index):
        own = margins[index == i]
        num_right = count_right(own)
        found.append(
            {
                "pairs": len(own),
                "confidence": float(confidence[index == i].mean()),
                "accuracy": num_right / len(own),
                "interval": interval(num_right, len(own)),
            }
        )
    return found


def bootstrap_interval(
    statistic: Callable[[Margins], float], margins: Margins
) -> tuple[float, float]:
    """The 95 % bias-corrected percentile interval of a statistic of margins (N,) (Efron 1981).

    Bias-corrected since ECE is larger on resamples than on the pairs themselves.
    """
    value = statistic(margins)
    if len(margins) < 2:
        return value, value
    resampled = bootstrap(
        (margins,),
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, MAX_RESAMPLED // len(margins)),  # at a time, or all are in memory
        method="percentile",
        vectorized=False,
        rng=0,
    ).bootstrap_distribution

    share_below = np.clip(np.mean(resampled < value), 0.5 / RESAMPLES, 1 - 0.5 / RESAMPLES)
    bias = ndtri(share_below)
    low, high = np.quantile(resampled, ndtr(2 * bias + ndtri([0.025, 0.975])))
    return min(float(low), value), max(float(high), value)


def calibration_report(margins: Margins, method: Method = "temperature") -> dict[str, Any]:
    """Accuracy, scaling, ECE and Brier score before and after, for held-out margins (N,), N > 0.

    The scaling is fitted on all of them; the errors after it are measured by cross-fitting: each
    pair is scaled by a fit on the other folds. There is a `reason` instead if none can be fitted.
    There is nothing after if the method is "none", or if the pairs without one fold have no fit, as
    when the only pairs whose sign is wrong are in that fold.
    """
    margins = np.asarray(margins, dtype=np.float64)
    num_right = count_right(margins)
    report: dict[str, Any] = {
        "validation_pairs": len(margins),
        "accuracy": num_right / len(margins),
        "accuracy_interval": interval(num_right, len(margins)),
        "method": method,
        **_errors(margins, "before"),
    }
    if method == "none":
        return report
    scaling = fit_scaling(margins, method)
    if scaling is None:
        what = "temperature" if method == "temperature" else "increasing function"
        cause = _why_nothing_fits(margins, report["accuracy_interval"])
        reason = f"no {what} fits {len(margins)} pairs: {cause}"
        return {**report, "temperature": None, "reason": reason}
    fitted_as: dict[str, Any] = {"temperature": scaling.temperature}
    if method == "isotonic":
        fitted_as = {"knots": scaling.knots}

    # Each pair's scaling is fitted on the other folds.
    fold = np.arange(len(margins)) % FOLDS
    scaled = np.empty_like(margins)
    for i in range(FOLDS):
        others = fit_scaling(margins[fold != i], method)
        if others is None:
            return {**report, **fitted_as}
        scaled[fold == i] = others(margins[fold == i])
    return {**report, **fitted_as, **_errors(scaled, "after")}


def _why_nothing_fits(margins: Margins, accuracy_interval: tuple[float, float]) -> str:
    if np.all(margins >= 0):
        return "no margin is negative; with more pairs (data.validation_fraction) some may be"
    if accuracy_interval[1] < 0.5:
        return (
            "the reward model prefers the rejected responses: are chosen and rejected swapped in "
            "part of the data?"
        )
    if count_right(margins) <= len(margins) / 2:
        return "the accuracy is too close to chance; train the reward model longer or on more pairs"
    return f"the best one is not between {TEMPERATURE_BOUNDS[0]:g} and {TEMPERATURE_BOUNDS[1]:g}"


def _errors(margins: Margins, when: str) -> dict[str, Any]:
    """ECE and Brier score with their intervals, and the bins of the former."""
    return {
        f"ece_{when}": expected_calibration_error(margins),
        f"ece_{when}_interval": bootstrap_interval(expected_calibration_error, margins),
        f"brier_{when}": brier_score(margins),
        f"brier_{when}_interval": bootstrap_interval(brier_score, margins),
        f"reliability_{when}": reliability(margins),
    }
