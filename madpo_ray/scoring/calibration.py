"""How well calibrated the margins are: accuracy, a temperature, and errors before and after it.

A margin h is calibrated if sigmoid(h) is the share of such pairs whose label agrees. Rows are
chosen-oriented, so a pair's label agrees if its margin is positive.

Legend: N pairs.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, ndtri

Margins = NDArray[np.float64]
FOLDS = 5
# A fit that ends at these bounds has no optimum inside: the margins have one sign only, or are
# worse than chance.
TEMPERATURE_BOUNDS = (1e-3, 1e3)


def count_right(differences: Margins) -> float:
    """How many of the differences (N,) are positive. A tie counts one half."""
    return float((differences > 0).sum() + 0.5 * (differences == 0).sum())


def interval(successes: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share (Wilson 1927); ties make halves of successes."""
    z = float(ndtri(0.975))
    share = successes / count
    center = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def fit_temperature(margins: Margins) -> float | None:
    """The T that minimises mean -log sigmoid(margin / T), for margins (N,).

    Source: Guo et al. 2017, for two classes. None if no finite T does.
    """
    is_right = margins > 0
    if len(margins) == 0 or np.mean(is_right) <= 0.5 or np.all(is_right):
        return None
    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(
        lambda log_t: -np.mean(log_expit(margins / np.exp(log_t))),
        bounds=(low, high),
        method="bounded",
    )
    is_inside = low + 0.01 < found.x < high - 0.01
    return float(np.exp(found.x)) if is_inside else None


def expected_calibration_error(margins: Margins, bins: int = 10) -> float:
    """Mean |confidence - accuracy| over equal-width bins of sigmoid(|margin|) in [0.5, 1].

    On chosen-oriented rows the confidence must be that of the margin's sign: comparing
    sigmoid(margin) with an outcome that is always 1 would give 0.30 for a perfect model.
    """
    confidence = expit(np.abs(margins))
    is_right = margins > 0
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(confidence[index == i].sum() - is_right[index == i].sum()) for i in range(bins)]
    return float(np.sum(gaps) / len(margins))


def brier_score(margins: Margins) -> float:
    """Mean (1 - sigmoid(margin))^2 (Brier 1950)."""
    return float(np.mean(expit(-margins) ** 2))


def calibration_report(margins: Margins) -> dict[str, Any]:
    """Accuracy, temperature, ECE and Brier score before and after, for held-out margins (N,).

    The temperature is fitted on all of them; the errors after it are measured on pairs that did not
    fit theirs, by cross-fitting over folds. `temperature` is None, with a `reason`, if none is
    finite.
    """
    margins = np.asarray(margins, dtype=np.float64)
    num_right = count_right(margins)
    report: dict[str, Any] = {
        "validation_pairs": len(margins),
        "accuracy": num_right / len(margins),
        "accuracy_interval": interval(num_right, len(margins)),
        "temperature": fit_temperature(margins),
        "ece_before": expected_calibration_error(margins),
        "brier_before": brier_score(margins),
    }

    # Each pair's temperature is fitted on the other folds.
    fold = np.arange(len(margins)) % FOLDS
    fitted = [fit_temperature(margins[fold != i]) for i in range(FOLDS)]
    if report["temperature"] is None or None in fitted:
        cause = "the accuracy is too close to chance"
        if num_right == len(margins):
            cause = "all margins are positive"
        elif report["accuracy_interval"][1] < 0.5:
            cause = (
                "the reward model prefers the rejected responses: are chosen and rejected swapped "
                "in part of the data?"
            )
        reason = f"no finite temperature fits {len(margins)} pairs: {cause}"
        return {**report, "temperature": None, "reason": reason}

    scaled = margins / np.asarray(fitted, dtype=np.float64)[fold]
    return {
        **report,
        "ece_after": expected_calibration_error(scaled),
        "brier_after": brier_score(scaled),
    }
