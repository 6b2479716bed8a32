"""How far margins can be taken at their word: accuracy with its interval, a temperature, and errors before and after
it.

A margin h is calibrated where sigmoid(h) is the share of pairs whose label agrees. Rows are chosen-oriented, so a
pair's label agrees where its margin is positive.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from scipy.stats import binomtest

Margins = NDArray[np.float64]
FOLDS = 5
# A fit that ends at these bounds has no optimum inside: margins of one sign only, or worse than chance.
TEMPERATURE_BOUNDS = (1e-3, 1e3)


def interval(successes: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share (Wilson 1927)."""
    low, high = binomtest(successes, count).proportion_ci(method="wilson")
    return float(low), float(high)


def fit_temperature(margins: Margins) -> float | None:
    """The T that minimises mean -log sigmoid(margin / T) (Guo et al. 2017, for two classes); None where none is
    finite."""
    if len(margins) == 0 or np.mean(margins > 0) <= 0.5 or np.all(margins > 0):
        return None
    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(
        lambda log_t: -np.mean(log_expit(margins / np.exp(log_t))), bounds=(low, high), method="bounded"
    )
    inside = low + 0.01 < found.x < high - 0.01
    return float(np.exp(found.x)) if inside else None


def expected_calibration_error(margins: Margins, bins: int = 10) -> float:
    """Mean |confidence - accuracy| over equal-width bins of the confidence sigmoid(|margin|), in [0.5, 1].

    On chosen-oriented rows the confidence must be of the sign that the margin has: comparing sigmoid(margin) with an
    outcome that is always 1 would give 0.30 for a perfect model.
    """
    confidence, right = expit(np.abs(margins)), margins > 0
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(confidence[index == i].sum() - right[index == i].sum()) for i in range(bins)]
    return float(np.sum(gaps) / len(margins))


def brier_score(margins: Margins) -> float:
    """Mean (1 - sigmoid(margin))^2 (Brier 1950)."""
    return float(np.mean(expit(-margins) ** 2))


def calibration_report(margins: Margins) -> dict[str, Any]:
    """Accuracy, temperature, and ECE and Brier score before and after, for held-out margins (N,).

    The temperature is fitted on all of them; the errors after it are measured on pairs that did not fit theirs, by
    cross-fitting over folds. `temperature` is None, with a `reason`, where none is finite.
    """
    margins = np.asarray(margins, dtype=np.float64)
    right = int((margins > 0).sum())
    report: dict[str, Any] = {
        "validation_pairs": len(margins),
        "accuracy": right / len(margins),
        "accuracy_interval": interval(right, len(margins)),
        "temperature": fit_temperature(margins),
        "ece_before": expected_calibration_error(margins),
        "brier_before": brier_score(margins),
    }
    fold = np.arange(len(margins)) % FOLDS
    fitted = [fit_temperature(margins[fold != i]) for i in range(FOLDS)]
    if report["temperature"] is None or None in fitted:
        cause = "all margins are positive" if right == len(margins) else "the accuracy is too near to chance"
        return {**report, "temperature": None, "reason": f"no finite temperature fits {len(margins)} pairs: {cause}"}
    scaled = margins / np.asarray(fitted, dtype=np.float64)[fold]
    return {**report, "ece_after": expected_calibration_error(scaled), "brier_after": brier_score(scaled)}
