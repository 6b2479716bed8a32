"""Numbers of scored margins, by hand and on margins that are calibrated by construction."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from madpo_ray.losses import madpo_weight
from madpo_ray.scoring.calibration import (
    calibration_report,
    expected_calibration_error,
    reliability,
)
from madpo_ray.scoring.report import (
    accuracy_by_margin,
    describe_margins,
    describe_weights,
    find_alarms,
    most_negative,
)


def calibrated_margins(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    size = rng.exponential(1.5, count)
    agrees = rng.random(count) < expit(size)
    return np.where(agrees, size, -size)


def weights(margins: np.ndarray) -> np.ndarray:
    found: np.ndarray = madpo_weight(
        torch.from_numpy(margins), c_min=0.25, c_max=4.0, lmbda=1.0, tau=7.0
    ).numpy()
    return found


def test_margins_by_hand() -> None:
    found = describe_margins(np.array([-1.0, 0.0, 1.0, 4.0]))
    assert found["pairs"] == 4
    assert found["mean"] == 1.0
    assert found["negative_fraction"] == 0.25
    assert found["quantiles"]["0.5"] == 0.5
    assert found["standard_deviation"] == pytest.approx(np.sqrt(3.5))
    assert describe_margins(np.array([])) == {"pairs": 0}


def test_weights_by_hand() -> None:
    """(1 + 3)^2 / (1 + 9) = 1.6."""
    found = describe_weights(np.array([1.0, 3.0]))
    assert found == {"mean": 2.0, "min": 1.0, "max": 3.0, "effective_sample_size": 1.6}


def test_calibrated_margins_have_a_mean_weight_of_one() -> None:
    """Margins of another scale do not: the alarm rings either way."""
    margins = calibrated_margins(200_000)
    assert describe_weights(weights(margins))["mean"] == pytest.approx(1, abs=0.01)
    assert describe_weights(weights(margins / 2))["mean"] > 1.05
    assert describe_weights(weights(margins * 4))["mean"] < 0.95


def alarms(margins: np.ndarray) -> list[str]:
    report = calibration_report(margins, "none")
    return find_alarms(margins, weights, tau=7.0, calibration=report)


def test_alarms_ring_for_margins_of_another_scale() -> None:
    """Both, at four times the scale; none for a perfect reward model."""
    margins = calibrated_margins(4000)
    assert alarms(margins) == []
    assert alarms(margins[:50]) == []
    weight, error = alarms(margins * 4)
    assert weight.startswith("ALARM: the mean weight of held-out pairs below tau is 0.7")
    assert weight.endswith("): their margins are too large")
    assert error.startswith("ALARM: the calibration error (ECE) is 0.")
    assert alarms(margins / 4)[0].endswith("): their margins are too small")


def test_alarm_is_about_pairs_below_tau() -> None:
    """Of the others the weight is below 1 by definition."""
    margins = np.array([10.0] * 50 + [1.0, -1.0])

    def weight(values: np.ndarray) -> np.ndarray:
        return np.where(np.abs(values) < 7, 1.0, 0.5)

    bins = [{"pairs": 50, "confidence": 0.8}, {"pairs": 2, "confidence": 0.6}]
    report = {"ece_before": 0.05, "reliability_before": bins}
    assert find_alarms(margins, weight, tau=7.0, calibration=report) == []
    ringing = {**report, "ece_after": 0.2, "reliability_after": bins}
    (alarm,) = find_alarms(margins, weight, tau=7.0, calibration=ringing)
    assert "(ECE) is 0.200, where chance makes 0.0" in alarm


@pytest.mark.parametrize("count", [2, 20, 100, 1000])
@pytest.mark.parametrize("mean_size", [0.3, 1.5, 4.0])
def test_alarms_of_calibrated_margins_are_rare(count: int, mean_size: float) -> None:
    """Whatever the number of pairs, and however sure the reward model is."""
    rng = np.random.default_rng(1)
    rung = 0
    for _ in range(200):
        size = rng.exponential(mean_size, count)
        margins = np.where(rng.random(count) < expit(size), size, -size)
        report = {
            "ece_before": expected_calibration_error(margins),
            "reliability_before": reliability(margins),
        }
        rung += bool(find_alarms(margins, weights, tau=7.0, calibration=report))
    assert rung <= 10


def test_accuracy_grows_with_the_margin_as_calibration_says() -> None:
    bins = accuracy_by_margin(calibrated_margins(50_000))
    assert [one["pairs"] for one in bins] == [5000] * 10
    for one in bins:
        assert one["accuracy"] == pytest.approx(one["expected"], abs=0.03)
    assert bins[0]["to"] <= bins[1]["from"]
    assert bins[-1]["accuracy"] > bins[0]["accuracy"] + 0.3


@pytest.mark.parametrize("count", [0, 1, 7])
def test_few_pairs_make_few_bins(count: int) -> None:
    bins = accuracy_by_margin(np.arange(1.0, 1.0 + count))
    assert [one["pairs"] for one in bins] == [1] * count


def test_most_negative_come_first() -> None:
    margins = np.array([1.0, -2.0, 0.0, -5.0, -1.0])
    assert most_negative(margins, 2) == [3, 1]
    assert most_negative(margins, 9) == [3, 1, 4]
