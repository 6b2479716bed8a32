"""Pairs that are scored while the policy is trained on them."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from madpo_ray import pipeline
from madpo_ray.artifacts.tables import read_columns
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import evaluate, margins, pairs, train
from madpo_ray.training.metrics import read_metrics
from support.judges import count_kind_words

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

Run = tuple[Config, list[str]]


def ignore(what: object) -> None:
    """Prints nothing."""


def losses(config: Config) -> list[float]:
    lines = read_metrics(train.STAGE.folder(config) / "metrics.jsonl")
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.fixture
def unscored(finished_run: Run, tmp_path: Path) -> dict[str, Any]:
    """The config of a copy of the finished run that has pairs and a reward model only."""
    config, _ = finished_run
    shutil.copytree(config.run.folder, tmp_path / "tiny", symlinks=True)
    for name in ("margins", "scores", "train", "evaluate", "ray"):
        shutil.rmtree(tmp_path / "tiny" / name)
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(tmp_path)
    raw["margins"]["mode"] = "stream"
    return raw


def test_one_model_at_a_time_gives_the_same(
    unscored: dict[str, Any], finished_run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    unscored["margins"]["mode"] = "stored"
    unscored["scoring"]["one_model_at_a_time"] = True
    config = parse_config(unscored)
    with caplog.at_level(logging.INFO, logger="madpo_ray"):
        pipeline.run_stage(config, margins.STAGE, say=ignore)
    passes = [one for one in caplog.messages if one.startswith("scores of this pass")]
    assert passes == ["scores of this pass: reward", "scores of this pass: reference"]
    names = ["pair_id", "margin", "ref_chosen_logps", "ref_rejected_logps"]
    both = [read_columns(margins.STAGE.rows(one), names) for one in (config, finished_run[0])]
    assert both[0].equals(both[1])


@pytest.mark.slow
def test_streamed_run_equals_a_stored_one(unscored: dict[str, Any]) -> None:
    """Over two epochs: losses, and the margins that are left; every pair is scored once."""
    unscored["train"] |= {"max_steps": -1, "num_train_epochs": 2}
    config = parse_config(unscored)
    pipeline.run_stage(config, train.STAGE, say=ignore)
    streamed = losses(config)
    (kept,) = config.run.ray_folder.glob("margins-*/kept")
    scored = [one for file in kept.glob("*.parquet") for one in read_ids(file)]
    rows = read_columns(pairs.STAGE.rows(config), ["pair_id", "split"]).to_pylist()
    assert sorted(scored) == sorted(row["pair_id"] for row in rows if row["split"] != "test")

    # Stage margins collects them, and scores what no training reads.
    pipeline.run_all(config, say=ignore)
    assert evaluate.STAGE.is_finished(config)
    assert read_columns(margins.STAGE.rows(config), ["pair_id"])["pair_id"].to_pylist() == [
        row["pair_id"] for row in rows
    ]
    assert not kept.exists()

    # The same with the stored ones.
    shutil.rmtree(train.STAGE.folder(config))
    pipeline.run_stage(config, train.STAGE, say=ignore)
    assert len(streamed) > 14
    assert losses(config) == pytest.approx(streamed, abs=1e-5)


@pytest.mark.slow
def test_streamed_texts_reach_a_function(unscored: dict[str, Any]) -> None:
    """It scores each pair from its texts; a pair that it fails for is not trained on.

    The other member of the ensemble gives the same rewards. If one failure is too many, the
    training does not end well; the same command continues it with another limit.
    """
    unscored["reward"] = {
        "source": "support.judges:fail_for_one",
        "ensemble": ["support.judges:count_kind_words"],
    }
    unscored["margins"]["calibration"] = "none"
    unscored["train"] |= {"max_steps": -1, "num_train_epochs": 2}
    unscored["data"]["max_reject_fraction"] = 0.01
    config = parse_config(unscored)
    with pytest.raises(UserError, match=r"1 of \d+ pairs cannot be scored"):
        pipeline.run_all(config, say=ignore)
    (metrics,) = config.run.ray_folder.glob("train-*/metrics/metrics.jsonl")
    assert read_metrics(metrics)[-1]["epoch"] <= 1  # of 2
    unscored["data"]["max_reject_fraction"] = 0.5
    config = parse_config(unscored)
    pipeline.run_all(config, say=ignore)
    names = ["prompt", "chosen", "rejected", "margin", "margin_std"]
    rows = read_columns(margins.STAGE.rows(config), names)
    assert rows.num_rows == 89
    for row in rows.to_pylist():
        assert row["margin_std"] == 0
        rewards = [
            count_kind_words([row["prompt"]], [row[name]])[0] for name in ("chosen", "rejected")
        ]
        assert row["margin"] == rewards[0] - rewards[1]
    lines = read_metrics(train.STAGE.folder(config) / "metrics.jsonl")
    means = [line["margin/mean"] for line in lines if "margin/mean" in line]
    assert len(means) >= 7
    assert all(map(math.isfinite, means))


def read_ids(file: Path) -> list[str]:
    ids: list[str] = pq.read_table(file, columns=["pair_id"])["pair_id"].to_pylist()
    return ids
