"""What a run would do, before it does it."""

from typing import Any

import pytest

from madpo_ray import pipeline, planner
from madpo_ray.config import Config, parse_config


def plan_of(raw: dict[str, Any]) -> planner.Plan:
    config = parse_config(raw)
    return planner.plan(config, pipeline.wanted_stages(config))


def test_estimates_steps_from_rows(raw_config: dict[str, Any]) -> None:
    raw_config["train"] |= {"max_steps": -1, "num_train_epochs": 2}
    plan = plan_of(raw_config)
    assert list(plan.rows.values()) == [90]
    assert plan.pairs is None
    steps = {training.stage: training.steps for training in plan.trainings}
    # 90 rows, of which 0.45 are held out: 49 pairs, 7 steps of 8.
    assert steps == {"sft": 2, "reward": 21, "train": 14}


@pytest.mark.ray
def test_counts_pairs_of_a_finished_stage(finished_run: tuple[Config, Any]) -> None:
    config, _ = finished_run
    plan = planner.plan(config, pipeline.wanted_stages(config))
    assert plan.pairs is not None
    assert sum(plan.pairs.values()) == 90
    assert plan.stages == []


@pytest.mark.parametrize(("loss_type", "has_reward"), [("sigmoid", False), ("madpo", True)])
def test_reward_model_follows_the_loss(
    loss_type: str, has_reward: bool, raw_config: dict[str, Any]
) -> None:
    raw_config["train"]["loss_type"] = loss_type
    plan = plan_of(raw_config)
    assert ("reward" in plan.stages) is has_reward
    assert ("reward" in [training.stage for training in plan.trainings]) is has_reward
