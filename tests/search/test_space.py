"""Search spaces: what is drawn, what follows, and the config's own point."""

from typing import Any

import pytest

from madpo_ray.config import parse_config
from madpo_ray.errors import UserError
from madpo_ray.search.space import (
    corners,
    count_trials,
    drawn_domains,
    own_point,
    random_points,
    settings_of,
    with_reciprocals,
)

SPACE = {
    "train.c_max": {"type": "uniform", "min": 1.5, "max": 6.0},
    "train.c_min": {"type": "reciprocal", "of": "train.c_max"},
    "train.beta": {"type": "loguniform", "min": 0.01, "max": 0.5},
    "train.lora_r": {"type": "int", "min": 4, "max": 16},
    "train.loss_type": {"type": "choice", "values": ["madpo", "sigmoid"]},
}


def config_with(raw: dict[str, Any], space: dict[str, Any], **tune: Any) -> Any:
    raw["tune"] = {"search_space": space, **tune}
    return parse_config(raw)


def test_reciprocal_follows(raw_config: dict[str, Any]) -> None:
    space = config_with(raw_config, SPACE).search_space
    assert "train.c_min" not in drawn_domains(space)
    drawn = {"train.c_max": 4.0, "train.beta": 0.1, "train.lora_r": 8, "train.loss_type": "madpo"}
    values = with_reciprocals(space, drawn)
    assert list(values) == list(SPACE)
    assert values["train.c_min"] == 0.25
    assert settings_of({**values, "run.seed": 3}) == (
        {"c_max": 4.0, "c_min": 0.25, "beta": 0.1, "lora_r": 8, "loss_type": "madpo"},
        3,
    )


def test_own_point_is_in_the_space_or_none(raw_config: dict[str, Any]) -> None:
    raw_config["train"] |= {"c_max": 4.0, "c_min": 0.25}
    config = config_with(raw_config, SPACE)
    own = own_point(config)
    assert own is not None
    assert own["train.c_max"] == config.train.c_max
    assert with_reciprocals(config.search_space, own)["train.c_min"] == config.train.c_min
    raw_config["train"]["c_min"] = 0.5  # c_max gives 0.25: it would not be the config's
    assert own_point(config_with(raw_config, SPACE)) is None
    raw_config["train"] |= {"c_min": 0.25, "beta": 2.0}
    assert own_point(config_with(raw_config, SPACE)) is None


def test_corners_reach_every_end(raw_config: dict[str, Any]) -> None:
    found = corners(config_with(raw_config, SPACE).search_space)
    assert {values["train.c_max"] for values in found} == {1.5, 6.0}
    assert {values["train.c_min"] for values in found} == {1 / 1.5, 1 / 6.0}
    assert {values["train.loss_type"] for values in found} == {"madpo", "sigmoid"}
    assert len(found) == 2**4  # every combination


def test_grid_points_multiply(raw_config: dict[str, Any]) -> None:
    space = {
        "train.tau": {"type": "grid", "values": [2.0, 7.0]},
        "run.seed": {"type": "grid", "values": [0, 1, 2]},
        "train.beta": {"type": "uniform", "min": 0.1, "max": 0.2},
    }
    config = config_with(raw_config, space, searcher="random", num_samples=2)
    assert count_trials(config) == 12
    points = random_points(config)
    assert points == random_points(config)
    assert len(points) == 12
    # The other key is the same on all points of a grid; first the config's own value.
    betas = [point["train.beta"] for point in points]
    assert betas[:6] == [config.train.beta] * 6
    assert len(set(betas[6:])) == 1
    assert betas[6] != betas[0]
    assert {(point["train.tau"], point["run.seed"]) for point in points[:6]} == {
        (tau, seed) for tau in (2.0, 7.0) for seed in (0, 1, 2)
    }


def test_random_draws_stay_in_their_ranges(raw_config: dict[str, Any]) -> None:
    space = {
        "train.beta": {"type": "loguniform", "min": 0.01, "max": 0.5},
        "train.lora_r": {"type": "int", "min": 2, "max": 9, "log": True},
        "train.global_batch_size": {"type": "int", "min": 4, "max": 6},
        "train.use_peft": {"type": "choice", "values": [True, False]},
    }
    points = random_points(config_with(raw_config, space, searcher="random", num_samples=200))
    assert all(0.01 <= point["train.beta"] <= 0.5 for point in points)
    assert {point["train.lora_r"] for point in points} == set(range(2, 10))
    assert {point["train.global_batch_size"] for point in points} == {4, 5, 6}
    assert {point["train.use_peft"] for point in points} == {True, False}


@pytest.mark.parametrize(
    ("space", "tune", "message"),
    [
        (
            {"train.c_min": {"type": "reciprocal", "of": "train.tau"}},
            {},
            "which is not a range above 0",
        ),
        ({"train.tau": {"type": "grid", "values": [1.0]}}, {}, r"needs tune\.searcher: random"),
        (
            {"train.tau": {"type": "grid", "values": [1.0, 2.0]}},
            {"searcher": "random", "num_samples": 2},
            "would repeat the same points",
        ),
        ({"train.tau": {"type": "choice", "values": [1.0, 1.0]}}, {}, "given twice"),
        ({"train.tau": {"type": "uniform", "min": 2.0, "max": 1.0}}, {}, "needs min < max"),
        ({"train.beta": {"type": "loguniform", "min": 0.0, "max": 1.0}}, {}, "greater than 0"),
        ({"train.bta": {"type": "uniform", "min": 0.1, "max": 1.0}}, {}, r"mean 'train\.beta'\?"),
        ({"beta": {"type": "uniform", "min": 0.1, "max": 1.0}}, {}, r"mean 'train\.beta'\?"),
        ({"train.eval_steps": {"type": "int", "min": 1, "max": 9}}, {}, "cannot be searched"),
        ({"model.dtype": {"type": "choice", "values": ["float32"]}}, {}, "cannot be searched"),
        ({"train.lora_r": {"type": "int", "min": 0, "max": 9, "log": True}}, {}, "at least 1"),
        ({"train.tau": {"type": "choice", "values": [[1.0]]}}, {}, "values are texts, numbers"),
        (None, {"grace_period": 9}, r"more than tune\.evaluations"),
        (None, {"objective": "reward"}, r"set tune\.scheduler: none"),
        (None, {"scheduler": "pbt"}, "use asha"),
    ],
)
def test_refused(
    space: Any, tune: dict[str, Any], message: str, raw_config: dict[str, Any]
) -> None:
    raw_config["tune"] = {**tune, **({"search_space": space} if space else {})}
    with pytest.raises(UserError, match=message):
        parse_config(raw_config)
