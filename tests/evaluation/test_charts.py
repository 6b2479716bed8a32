"""Charts become pictures, whatever the margins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from madpo_ray.evaluation import charts
from madpo_ray.scoring.calibration import reliability
from madpo_ray.scoring.report import accuracy_by_margin, margin_histogram
from support.pages import require_drawn


def some_margins(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    size = rng.exponential(2.0, count)
    return np.where(rng.random(count) < expit(size), size, -size)


def margins_report(margins: np.ndarray, *, calibrated: bool = True) -> dict[str, Any]:
    bins = reliability(margins)
    histogram = margin_histogram(margins)
    curve = {"margin": histogram["edges"], "weight": [1.0 for _ in histogram["edges"]]}
    after = {"reliability_after": bins} if calibrated else {}
    return {
        "histogram": histogram,
        "weight_curve": curve,
        "calibration": {"reliability_before": bins, **after},
        "accuracy_by_margin": {"split": "test", "bins": accuracy_by_margin(margins)},
    }


@pytest.mark.parametrize("margins", [some_margins(2000), np.array([0.5]), np.array([1.0, 1.0])])
@pytest.mark.parametrize("calibrated", [True, False])
def test_charts_of_margins(margins: np.ndarray, calibrated: bool) -> None:
    require_drawn(charts.margin_charts(margins_report(margins, calibrated=calibrated)))


def test_histogram_holds_every_margin() -> None:
    """Those far out are in the last bins."""
    margins = np.append(some_margins(1000), [-500.0, 500.0])
    histogram = margin_histogram(margins)
    assert sum(histogram["pairs"]) == 1002
    assert len(histogram["edges"]) == len(histogram["pairs"]) + 1
    assert histogram["edges"][-1] < 100


def test_charts_of_samples() -> None:
    entries = [
        {
            "policy": policy,
            "temperature": temperature,
            "reward": {"mean": mean, "interval": interval},
            "on_frontier": mean > 1,
            "kl": 2.0 if policy == "policy" else 0.0,
        }
        for policy, temperature, mean, interval in (
            ("policy", 1.0, 2.0, (1.5, 2.5)),
            ("policy", 0.0, 1.5, None),
            ("reference", 1.0, 1.0, (0.5, 1.5)),
        )
    ]
    require_drawn(
        {"rewards": charts.rewards_chart(entries), "frontier": charts.frontier_chart(entries)}
    )


def test_picture_is_a_file(tmp_path: Path) -> None:
    chart = charts.histogram_chart(margins_report(some_margins(100)))
    charts.save_picture(chart, tmp_path / "margins.png")
    assert (tmp_path / "margins.png").read_bytes() == charts.picture(chart)
