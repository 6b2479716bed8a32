"""Temperature and calibration errors, on margins whose true scale is known."""

import numpy as np
import pytest
from scipy.special import expit

from madpo_ray.calibration import brier_score, calibration_report, expected_calibration_error, fit_temperature, interval


def calibrated_margins(count: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    size = rng.exponential(1.5, count)
    agrees = rng.random(count) < expit(size)
    return scale * np.where(agrees, size, -size)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_temperature_is_the_scale(scale: float) -> None:
    assert fit_temperature(calibrated_margins(20_000, scale)) == pytest.approx(scale, rel=0.05)


def test_calibrated_margins_have_no_calibration_error() -> None:
    margins = calibrated_margins(50_000)
    assert expected_calibration_error(margins) < 0.01
    assert expected_calibration_error(3 * margins) > 0.08
    assert brier_score(margins) < brier_score(3 * margins)


def test_a_perfect_model_has_no_error() -> None:
    assert expected_calibration_error(np.full(100, 40.0)) == pytest.approx(0, abs=1e-9)


def test_report_measures_on_pairs_that_did_not_fit() -> None:
    report = calibration_report(calibrated_margins(5_000, 4.0))
    assert report["temperature"] == pytest.approx(4.0, rel=0.1)
    assert report["ece_after"] < 0.03 < report["ece_before"]
    assert report["brier_after"] < report["brier_before"]


@pytest.mark.parametrize("margins", [np.array([-1.0, 1.0] * 10), np.array([-1.0, -2.0, 1.0]), np.full(10, 2.0)])
def test_chance_and_certainty_have_no_temperature(margins: np.ndarray) -> None:
    report = calibration_report(margins)
    assert report["temperature"] is None
    assert "no finite temperature" in report["reason"]


def test_interval_by_hand() -> None:
    # Wilson 1927 with z = 1.96: (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) at 8 of 10.
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
