"""Pictures are drawn, whatever the margins."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

from madpo_ray.evaluation import charts
from madpo_ray.scoring.calibration import reliability
from madpo_ray.scoring.report import accuracy_by_margin


def some_margins(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    size = rng.exponential(2.0, count)
    return np.where(rng.random(count) < expit(size), size, -size)


def colours(file: Path) -> int:
    """How many there are in a picture: a blank one has one."""
    with Image.open(file) as picture:
        assert picture.size == (840, 540)
        found = picture.convert("RGB").getcolors(maxcolors=10**6)
    assert found is not None
    return len(found)


@pytest.mark.parametrize("margins", [some_margins(2000), np.array([0.5]), np.array([1.0, 1.0])])
def test_pictures_are_drawn(margins: np.ndarray, tmp_path: Path) -> None:
    charts.draw_margins(margins, np.square, "Margins", tmp_path / "margins.png")
    charts.draw_margins(margins, None, "Margins", tmp_path / "no-weight.png")
    bins = reliability(margins)
    charts.draw_reliability(bins, bins, tmp_path / "reliability.png")
    charts.draw_reliability(bins, [], tmp_path / "not-calibrated.png")
    charts.draw_accuracy(accuracy_by_margin(margins), "Accuracy", tmp_path / "accuracy.png")
    for file in tmp_path.iterdir():
        assert colours(file) > 20, file


def test_pictures_of_samples_are_drawn(tmp_path: Path) -> None:
    entries = [
        {
            "policy": policy,
            "temperature": temperature,
            "reward": {"mean": mean, "interval": (mean - 0.5, mean + 0.5)},
            "on_frontier": mean > 1,
            "kl": 2.0 if policy == "policy" else 0.0,
        }
        for policy, temperature, mean in (
            ("policy", 1.0, 2.0),
            ("policy", 0.0, 1.5),
            ("reference", 1.0, 1.0),
        )
    ]
    charts.draw_rewards(entries, tmp_path / "rewards.png")
    charts.draw_frontier(entries, tmp_path / "frontier.png")
    for file in tmp_path.iterdir():
        assert colours(file) > 20, file


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    """They are files of an artifact."""
    for name in ("a", "b"):
        charts.draw_margins(some_margins(100), None, "Margins", tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
