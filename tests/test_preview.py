"""What a run would do, before it does it."""

from typing import Any

import pytest

from madpo_ray import pipeline
from madpo_ray.config import Config, parse_config
from madpo_ray.preview import Preview, preview


def preview_of(raw: dict[str, Any]) -> Preview:
    config = parse_config(raw)
    return preview(config, pipeline.wanted_stages(config))


def test_estimates_steps_from_rows(raw_config: dict[str, Any]) -> None:
    raw_config["train"] |= {"max_steps": -1, "num_train_epochs": 2}
    found = preview_of(raw_config)
    assert list(found.rows.values()) == [90]
    assert found.pairs is None
    steps = {training.stage: training.steps for training in found.trainings}
    # 90 rows, of which 0.45 are held out: 49 pairs, 7 steps of 8.
    assert steps == {"sft": 2, "reward": 21, "train": 14}


@pytest.mark.ray
def test_counts_pairs_of_a_finished_stage(finished_run: tuple[Config, Any]) -> None:
    config, _ = finished_run
    found = preview(config, pipeline.wanted_stages(config))
    assert found.pairs is not None
    assert sum(found.pairs.values()) == 90
    assert found.stages == found.trainings == []


@pytest.mark.parametrize(("loss_type", "has_reward"), [("sigmoid", False), ("madpo", True)])
def test_reward_model_follows_the_loss(
    loss_type: str, has_reward: bool, raw_config: dict[str, Any]
) -> None:
    raw_config["train"]["loss_type"] = loss_type
    found = preview_of(raw_config)
    assert ("reward" in found.stages) is has_reward
    assert ("reward" in [training.stage for training in found.trainings]) is has_reward
