"""What stage margins writes about its margins."""

import json
from typing import Any

import numpy as np
import pytest

from madpo_ray.artifacts.tables import read_columns, read_split
from madpo_ray.config import Config
from madpo_ray.stages import margins, margins_report

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

Run = tuple[Config, list[str]]


@pytest.fixture
def report(finished_run: Run) -> dict[str, Any]:
    folder = margins.STAGE.folder(finished_run[0])
    found: dict[str, Any] = json.loads((folder / "margins_report.json").read_text())
    return found


def test_counts_add_up(report: dict[str, Any]) -> None:
    counts = report["counts"]
    assert counts["read"] == 90
    left_out = sum(counts["rejected"].values()) + sum(counts["left_out"].values())
    assert counts["read"] == counts["written"] + left_out
    assert sum(split["pairs"] for split in report["splits"].values()) == counts["written"]


def test_numbers_are_those_of_the_rows(finished_run: Run, report: dict[str, Any]) -> None:
    rows = margins.STAGE.rows(finished_run[0])
    train = read_split(rows, "train", ["margin"])["margin"].to_numpy()
    found = report["splits"]["train"]
    assert found["mean"] == pytest.approx(train.mean())
    assert found["weight"]["effective_sample_size"] <= found["pairs"]
    assert report["accuracy_by_margin"]["split"] == "test"
    in_bins = sum(one["pairs"] for one in report["accuracy_by_margin"]["bins"])
    assert in_bins == report["splits"]["test"]["pairs"]
    assert report["calibration"]["ece_after_interval"][0] >= 0
    assert report["made_with"]["reward.source"] == ["trained"]


def test_pictures_and_mean_weights(finished_run: Run) -> None:
    config, printed = finished_run
    pictures = (margins.STAGE.folder(config) / "pictures").iterdir()
    expected = ["accuracy.png", "margins.png", "reliability.png"]
    assert sorted(file.name for file in pictures) == expected
    mean, by_label = [line for line in printed if "mean weight" in line]
    assert mean.endswith("1 for calibrated margins below tau")
    assert by_label.startswith("margins: mean weight by the true scores: ")


def test_wrong_labels_have_smaller_weights(finished_run: Run, report: dict[str, Any]) -> None:
    """By the true scores, which training does not see."""
    config, _ = finished_run
    names = ["margin", *config.score_columns]
    train = read_split(margins.STAGE.rows(config), "train", names).to_pylist()
    wrong = [row["margin"] for row in train if row["chosen_score"] < row["rejected_score"]]
    found = report["weights_by_label"]
    assert found["wrong"]["pairs"] == len(wrong) > 0
    assert found["right"]["pairs"] == len(train) - len(wrong)
    expected = margins_report.weights_of(np.array(wrong), config.train).mean()
    assert found["wrong"]["mean_weight"] == pytest.approx(expected)
    assert found["wrong"]["mean_weight"] < found["right"]["mean_weight"]


def test_suspicious_pairs_are_the_most_negative(finished_run: Run) -> None:
    config, _ = finished_run
    text = (margins.STAGE.folder(config) / "suspicious.jsonl").read_text()
    suspicious = [json.loads(line) for line in text.splitlines()]
    rows = read_columns(margins.STAGE.rows(config), ["pair_id", "split", "margin", "chosen"])
    negative = [row for row in rows.to_pylist() if row["split"] == "train" and row["margin"] < 0]
    negative.sort(key=lambda row: row["margin"])
    assert negative
    expected = [(row["pair_id"], row["margin"], row["chosen"]) for row in negative]
    assert [(row["pair_id"], row["margin"], row["chosen"]) for row in suspicious] == expected
    assert all(0 < row["weight"] <= 1 for row in suspicious)
