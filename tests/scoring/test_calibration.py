"""Temperature and calibration errors, on margins whose true scale is known."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from madpo_ray.scoring.calibration import (
    FOLDS,
    brier_score,
    calibration_report,
    count_right,
    expected_calibration_error,
    interval,
    reliability,
)
from madpo_ray.scoring.scaling import fit_temperature


def calibrated_margins(count: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    size = rng.exponential(1.5, count)
    agrees = rng.random(count) < expit(size)
    return scale * np.where(agrees, size, -size)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_temperature_is_the_scale(scale: float) -> None:
    assert fit_temperature(calibrated_margins(20_000, scale)) == pytest.approx(scale, rel=0.05)


def test_brier_by_hand() -> None:
    """sigmoid(ln 3) = 0.75, so (1 - 0.75)^2 = 0.0625; a margin of -ln 3 gives 0.5625."""
    assert brier_score(np.array([math.log(3)])) == pytest.approx(0.0625)
    assert brier_score(np.array([math.log(3), -math.log(3)])) == pytest.approx(0.3125)


def test_ece_by_hand() -> None:
    """Confidences 0.75, 0.75, 0.9, 0.9 with one of each pair right, in two bins of ten.

    |1.5 - 1| + |1.8 - 1| = 1.3, over four pairs.
    """
    margins = np.array([math.log(3), -math.log(3), math.log(9), -math.log(9)])
    assert expected_calibration_error(margins) == pytest.approx(1.3 / 4)


def test_calibrated_margins_have_no_error() -> None:
    margins = calibrated_margins(50_000)
    assert expected_calibration_error(margins) < 0.01
    assert expected_calibration_error(3 * margins) > 0.08
    assert brier_score(margins) < brier_score(3 * margins)


def test_perfect_model_has_no_error() -> None:
    assert expected_calibration_error(np.full(100, 40.0)) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(np.array([40.0, -40.0])) == pytest.approx(0.5)


def test_ece_has_ten_bins_above_one_half() -> None:
    """Confidences 0.52 (right) and 0.58 (wrong) are in two bins: their errors do not cancel."""
    margins = np.array([math.log(0.52 / 0.48), -math.log(0.58 / 0.42)])
    assert expected_calibration_error(margins) == pytest.approx((0.48 + 0.58) / 2)


def test_ties_are_half_right() -> None:
    """They are as confident as that, and say nothing of the temperature."""
    assert expected_calibration_error(np.zeros(10)) == 0
    margins = calibrated_margins(20_000, 1.0)
    with_ties = np.concatenate([margins, np.zeros(5_000)])
    expected = expected_calibration_error(margins) * 20 / 25
    assert expected_calibration_error(with_ties) == pytest.approx(expected, abs=2e-3)
    few_right = np.repeat([1.0, 0.0, -1.0], [45, 30, 25])
    temperature = calibration_report(few_right)["temperature"]
    assert temperature == pytest.approx(1 / np.log(45 / 25), rel=1e-3)


def test_temperature_is_that_of_a_logistic_regression() -> None:
    """scikit-learn's, without intercept and penalty: its coefficient is 1 / T.

    Each pair is shown in both orders: a regression needs both outcomes.
    """
    margins = calibrated_margins(500, 2.5)
    regression = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=1000)
    outcomes = np.repeat([1, 0], len(margins))
    regression.fit(np.concatenate([margins, -margins])[:, None], outcomes)
    assert fit_temperature(margins) == pytest.approx(1 / regression.coef_[0, 0], rel=1e-3)


def test_errors_are_scikit_learns() -> None:
    """Brier's over pairs shown in random order; the bins are those of its calibration curve."""
    margins = calibrated_margins(500, 2.0)
    is_first = np.random.default_rng(1).random(500) < 0.5
    probability = expit(np.where(is_first, margins, -margins))
    assert brier_score(margins) == pytest.approx(brier_score_loss(is_first, probability))

    confidence = expit(np.abs(margins))
    edges = np.linspace(0.5, 1, 11)
    counts = np.histogram(confidence, edges)[0]
    share, mean = calibration_curve(margins > 0, 2 * confidence - 1, n_bins=10)
    gaps = np.abs((mean + 1) / 2 - share) * counts[counts > 0]
    assert expected_calibration_error(margins) == pytest.approx(gaps.sum() / 500)


@pytest.mark.parametrize(
    "margins",
    [
        [],
        [3.0, -1.0],  # as many right as wrong
        [0.0, 0.0, 1.0, -0.5],  # ties are neither
        [0.0, 1.0, 2.0],  # none is wrong
        [30.0, -1.0, -1.0],  # more wrong than right, however large the right one is
        [1.0, 1.0, -10.0],  # an optimum beyond the largest temperature
        list(calibrated_margins(1000, 1e-6)),  # and below the smallest
    ],
)
def test_no_temperature_fits(margins: list[float]) -> None:
    assert fit_temperature(np.array(margins)) is None


def test_smallest_temperatures_fit() -> None:
    assert fit_temperature(calibrated_margins(20_000, 1.5e-3)) == pytest.approx(1.5e-3, rel=0.05)


def test_errors_after_are_out_of_fold() -> None:
    """Equal to an explicit loop over folds; the temperature is that of all pairs."""
    margins = calibrated_margins(400, 4.0)
    report = calibration_report(margins)
    scaled = np.empty_like(margins)
    for fold in range(FOLDS):
        is_held_out = np.arange(len(margins)) % FOLDS == fold
        temperature = fit_temperature(margins[~is_held_out])
        assert temperature is not None
        scaled[is_held_out] = margins[is_held_out] / temperature
    assert report["ece_after"] == pytest.approx(expected_calibration_error(scaled))
    assert report["brier_after"] == pytest.approx(brier_score(scaled))
    assert report["brier_before"] == pytest.approx(brier_score(margins))
    assert report["ece_before"] == pytest.approx(expected_calibration_error(margins))
    assert report["temperature"] == fit_temperature(margins)
    assert report["validation_pairs"] == 400


def test_ties_count_one_half() -> None:
    assert count_right(np.array([0.0, 1.0, -1.0, 2.0])) == 2.5
    assert calibration_report(np.array([0.0, 1.0, -1.0, 2.0]))["accuracy"] == 0.625


@pytest.mark.parametrize(
    ("margins", "cause"),
    [
        (np.array([-1.0, 1.0] * 10), "too close to chance"),
        (np.array([-1.0, -2.0, 1.0]), "too close to chance"),
        (
            np.full(10, 2.0),
            "no margin is negative; with more pairs (data.validation_fraction) some may be",
        ),
        (np.array([-1.0] * 40 + [1.0] * 10), "are chosen and rejected swapped"),
        (np.array([1.0, 1.0, -10.0]), "the best one is not between 0.001 and 1000"),
    ],
)
def test_chance_and_certainty_have_no_temperature(margins: np.ndarray, cause: str) -> None:
    report = calibration_report(margins)
    assert report["temperature"] is None
    assert cause in report["reason"]


@pytest.mark.parametrize("num_pairs", [10, 1000])
def test_a_single_wrong_pair_is_enough_for_a_temperature(num_pairs: int) -> None:
    """It is in one fold; without it no margin is negative, so nothing after is measured."""
    margins = np.abs(np.random.default_rng(0).normal(2, 1, num_pairs))
    margins[0] *= -1
    report = calibration_report(margins)
    assert report["temperature"] == fit_temperature(margins) is not None
    assert "reason" not in report
    assert "ece_after" not in report


def test_float32_margins_are_measured_in_float64() -> None:
    margins = calibrated_margins(400, 4.0).astype(np.float32)
    expected = brier_score(margins.astype(np.float64))
    assert calibration_report(margins)["brier_before"] == expected


def test_interval_by_hand() -> None:
    """Wilson 1927 at 8 of 10, z = 1.96.

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (5, 5), (3, 7), (190, 400)])
def test_interval_is_scipys(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(method="wilson")
    assert interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bins_are_those_of_the_error() -> None:
    """Of calibrated margins each bin's accuracy is its confidence; of others it is not."""
    margins = calibrated_margins(50_000)
    bins = reliability(margins)
    assert sum(one["pairs"] for one in bins) == 50_000
    gaps = [one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
    assert sum(gaps) / 50_000 == pytest.approx(expected_calibration_error(margins))
    inside = [one["interval"][0] <= one["confidence"] <= one["interval"][1] for one in bins]
    assert sum(inside) >= len(bins) - 2
    assert not all(
        one["interval"][0] <= one["confidence"] <= one["interval"][1]
        for one in reliability(4 * margins)
    )


def test_intervals_hold_the_errors() -> None:
    """And get smaller with more pairs; the same ones each time."""
    few = calibration_report(calibrated_margins(300, 2.0))
    many = calibration_report(calibrated_margins(10_000, 2.0))
    for when in ("before", "after"):
        for name in ("ece", "brier"):
            low, high = many[f"{name}_{when}_interval"]
            assert low < many[f"{name}_{when}"] < high
            few_low, few_high = few[f"{name}_{when}_interval"]
            assert high - low < few_high - few_low
    assert few == calibration_report(calibrated_margins(300, 2.0))


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_isotonic_regression_calibrates_like_a_temperature(scale: float) -> None:
    """Measured on pairs that did not fit it, margins of any scale."""
    report = calibration_report(calibrated_margins(20_000, scale), "isotonic")
    assert report["ece_after"] < 0.02
    assert report["brier_after"] < report["brier_before"] + 1e-3
    if scale == 4.0:
        assert report["ece_before"] > 0.1


def test_isotonic_regression_of_a_model_at_chance_is_refused() -> None:
    margins = np.array([-2.0, 1.0, -3.0, 2.0, -4.0, 0.5] * 20)
    report = calibration_report(margins, "isotonic")
    assert report["reason"].startswith("no increasing function fits 120 pairs")
