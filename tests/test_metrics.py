"""Metrics: means over pairs, extremes, effective sample size, and the log that a resumed run continues."""

from pathlib import Path

import pytest
import torch

from madpo_ray.metrics import Meter, MetricsLog, read_metrics, with_effective_sample_size


def test_means_are_weighted_by_pairs_and_fillers_do_not_count() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor([1.0, 2.0]), "weight/max": torch.tensor([1.0, 5.0])}, torch.ones(2))
    meter.add({"loss": torch.tensor([6.0]), "weight/max": torch.tensor([2.0])}, torch.ones(1))
    meter.add({"loss": torch.tensor([99.0]), "weight/max": torch.tensor([99.0])}, torch.zeros(1))
    assert meter.reduce() == {"loss": 3.0, "weight/max": 5.0, "pairs": 3.0}


def test_minimum() -> None:
    meter = Meter()
    meter.add({"min_reward": torch.tensor([1.0, -5.0])}, torch.tensor([1.0, 1.0]))
    meter.add({"min_reward": torch.tensor([-9.0])}, torch.zeros(1))
    assert meter.reduce()["min_reward"] == -5.0


def test_effective_sample_size() -> None:
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    meter = Meter()
    meter.add({"weight/mean": weights, "weight/squared": weights**2}, torch.ones(4))
    expected = weights.sum() ** 2 / (weights**2).sum() / 4
    metrics = with_effective_sample_size(meter.reduce())
    assert metrics["weight/effective_sample_size"] == pytest.approx(expected.item())
    assert "weight/squared" not in metrics


def test_a_resumed_log_goes_on_at_its_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # a kill in the middle of a line
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 30.0})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]
