"""Metrics: reductions by name and by hand, and the log that a resumed run continues."""

import threading
from pathlib import Path

import pytest
import torch

from madpo_ray.training.metrics import (
    Meter,
    Metric,
    MetricsLog,
    Reduction,
    last_with,
    means,
    read_metrics,
)


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_reduces_by_field_not_by_name() -> None:
    """Over pairs; fillers (valid 0) count for nothing."""
    meter = Meter()
    meter.add({"a/max": Metric(values(1, 2)), "b": Metric(values(1, 5), "max")}, torch.ones(2))
    meter.add({"a/max": Metric(values(6)), "b": Metric(values(2), "max")}, torch.ones(1))
    meter.add({"a/max": Metric(values(99)), "b": Metric(values(99), "max")}, torch.zeros(1))
    assert meter.reduce() == {"pairs": 3.0, "a/max": 3.0, "b": 5.0}


def test_minimum_and_sum() -> None:
    meter = Meter()
    meter.add({"low": Metric(values(1, -5), "min"), "n": Metric(values(3, 4), "sum")}, values(1, 1))
    meter.add({"low": Metric(values(-9), "min"), "n": Metric(values(9), "sum")}, torch.zeros(1))
    assert meter.reduce() == {"pairs": 2.0, "low": -5.0, "n": 7.0}


def test_merges_meters() -> None:
    """Sums add up, extremes stay extremes."""
    merged = Meter()
    for mean, low, high in ((1.0, 4.0, 5.0), (3.0, -2.0, 1.0)):
        part = Meter()
        metrics = {
            "mean": Metric(values(mean)),
            "low": Metric(values(low), "min"),
            "high": Metric(values(high), "max"),
        }
        part.add(metrics, torch.ones(1))
        merged.merge(part)
    assert merged.reduce() == {"pairs": 2.0, "mean": 2.0, "low": -2.0, "high": 5.0}


def test_effective_share_by_hand() -> None:
    """Weights 1, 0.5, 0, 2: 3.5^2 / (4 * 5.25)."""
    meter = Meter()
    meter.add({"w": Metric(values(1, 0.5), "effective_share")}, torch.ones(2))
    meter.add({"w": Metric(values(0, 2), "effective_share")}, torch.ones(2))
    assert meter.reduce()["w"] == pytest.approx(3.5**2 / (4 * 5.25))


def test_reduce_empties_the_meter() -> None:
    meter = Meter()
    assert not meter
    meter.add(means({"a": values(1)}), torch.ones(1))
    assert meter
    meter.reduce()
    assert not meter


def test_resumed_log_continues_at_its_step(tmp_path: Path) -> None:
    """Lines after it are cut, and so is a line that a kill tore."""
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0]


def test_last_line_with_a_metric() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3}]
    assert last_with(lines, "loss") == {"step": 2, "loss": 2.0}
    assert last_with(lines, "accuracy") is None


@pytest.mark.parametrize(("reduction", "expected"), [("min", -5.0), ("max", 3.0)])
def test_extremes_over_several_batches(reduction: Reduction, expected: float) -> None:
    meter = Meter()
    for value in (1.0, -5.0, 3.0):
        meter.add({"x": Metric(values(value), reduction)}, torch.ones(1))
    assert meter.reduce() == {"pairs": 3.0, "x": expected}


def test_one_pair_is_a_mean() -> None:
    meter = Meter()
    meter.add(means({"x": values(3)}), torch.ones(1))
    assert meter.reduce() == {"pairs": 1.0, "x": 3.0}


def test_fillers_have_no_share() -> None:
    meter = Meter()
    meter.add({"w": Metric(values(1, 0.5), "effective_share")}, torch.ones(2))
    meter.add({"w": Metric(values(99), "effective_share")}, torch.zeros(1))
    assert meter.reduce()["w"] == pytest.approx(1.5**2 / (2 * 1.25))


def test_tensorboard_shows_what_the_log_holds(tmp_path: Path) -> None:
    """Also after a resume: what came after its step is gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "a" / "run"  # made with its parents
    log = MetricsLog(folder, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    before = set(threading.enumerate())
    log = MetricsLog(folder, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    assert set(threading.enumerate()) <= before

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    points = [(event.step, event.value) for event in shown.Scalars("loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_line_that_is_nested_too_deep_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("[" * 200_000 + '\n{"step": 1}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
