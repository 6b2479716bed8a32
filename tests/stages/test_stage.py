"""The frame that every stage shares."""

from typing import Any

import pyarrow as pa
import pytest

from madpo_ray import pipeline
from madpo_ray.artifacts.building import building
from madpo_ray.artifacts.tables import rows_folder, write_table
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import evaluate, export, margins, pairs, reward, sft, train, tune
from madpo_ray.stages.stage import Build, Stage


def stage(**fields: Any) -> Stage:
    def make(build: Build) -> dict[str, Any]:
        (build.folder / "fingerprint").write_text(build.fingerprint)
        return {"deadline": build.deadline}

    defaults: dict[str, Any] = {
        "name": "one",
        "help": "",
        "settings": lambda config: {"seed": config.run.seed},
        "make": make,
        "describe": lambda results: [],
    }
    return Stage(**{**defaults, **fields})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_builds_requires_and_finishes(config: Config) -> None:
    first = stage()
    second = stage(name="two", upstream=lambda config: (first,), settings=lambda config: {})
    with pytest.raises(UserError, match="run `madpo-ray run --until one` first"):
        second.run(config)

    assert first.run(config, deadline=5.0) == {"deadline": 5.0}
    assert first.is_finished(config)
    assert first.require(config) == {"deadline": 5.0}
    fingerprint = first.inputs(config).fingerprint
    assert (first.folder(config) / "fingerprint").read_text() == fingerprint
    assert second.inputs(config).upstream == {"one": fingerprint}
    second.run(config)

    changed = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    assert not first.is_finished(changed)
    assert not second.is_finished(changed)


SCORES = ("chosen_score", "rejected_score")  # which the fixture's config asks for


def write_pairs(config: Config) -> None:
    """Stage pairs as finished, with a few pairs of one group."""
    split = ["train", "train", "validation"]
    ones = [1] * len(split)
    table = {
        "pair_id": ["a", "b", "c"],
        "prompt": ["say"] * len(split),
        "split": split,
        "group_hash": ones,
        "prompt_length": [4, 10, 4],
        "chosen_length": ones,
        "rejected_length": ones,
        "own_weight": [1.0, -1.0, 1.0],
        "own_margin": [1.0, -1.0, 1.0],
    }
    with building(pairs.STAGE.folder(config), pairs.STAGE.inputs(config)) as (folder, _):
        write_table(pa.table(table), rows_folder(folder))


@pytest.mark.parametrize(
    ("checked", "changes", "message"),
    [
        (reward.STAGE, {"reward": {"folds": 2}}, "reward.folds: 2 folds of 2 training pairs"),
        (
            train.STAGE,
            {
                "train": {"weight_column": "own_weight"},
                "data": {"keep_columns": [*SCORES, "own_weight"]},
            },
            "own_weight is missing, negative or not finite for 1 pairs, such as b",
        ),
        (train.STAGE, {"train": {"max_tokens_per_device": 11}}, "11 is less than .* 12 tokens"),
        (reward.STAGE, {"reward": {"max_tokens_per_device": 11}}, "11 is less than .* 12 tokens"),
        (sft.STAGE, {"sft": {"max_tokens_per_device": 10}}, "10 is less than .* 11 tokens"),
        (
            margins.STAGE,
            {
                "reward": {"source": "columns", "source_columns": ["own_margin"]},
                "data": {"keep_columns": [*SCORES, "own_margin"]},
            },
            "the margins cannot be calibrated: .* no margin is negative",
        ),
    ],
    ids=["folds", "weights", "budget", "reward budget", "sft budget", "given margins"],
)
def test_what_the_pairs_show_is_refused_before_any_training(
    checked: Stage, changes: dict[str, dict[str, Any]], message: str, raw_config: dict[str, Any]
) -> None:
    for section, keys in changes.items():
        raw_config[section] = raw_config.get(section, {}) | keys
    config = parse_config(raw_config)
    checked.check(config)
    write_pairs(config)
    with pytest.raises(UserError, match=message):
        checked.check(config)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_checks_upstream_before_it_builds(config: Config) -> None:
    def refuse(config: Config) -> None:
        raise UserError("no")

    refusing = stage(check_upstream=refuse)
    with pytest.raises(UserError, match="no"):
        refusing.run(config)
    assert not refusing.folder(config).exists()


def test_stages_read_earlier_ones_only(raw_config: dict[str, Any]) -> None:
    """In the order of the table, and by file only."""
    config = parse_config(raw_config)
    for i, one in enumerate(pipeline.STAGES):
        assert set(one.upstream(config)) <= set(pipeline.STAGES[:i])
    assert margins.STAGE.upstream(config) == (pairs.STAGE, sft.STAGE, reward.STAGE)
    assert train.STAGE.upstream(config) == (sft.STAGE, margins.STAGE)


def test_training_that_scores_comes_before_margins(raw_config: dict[str, Any]) -> None:
    """However the stages were asked for."""
    raw_config["margins"] = {"mode": "stream"}
    config = parse_config(raw_config)
    for until in (None, evaluate.STAGE):
        names = [stage.name for stage in pipeline.wanted_stages(config, until)]
        assert names.index("train") + 1 == names.index("margins")
    assert train.STAGE not in pipeline.wanted_stages(config, export.STAGE)


@pytest.mark.parametrize(
    ("loss_type", "sft_section", "expected"),
    [
        ("madpo", None, [pairs, reward, margins, train, evaluate]),
        ("madpo", {}, [pairs, sft, reward, margins, train, evaluate]),
        ("sigmoid", None, [pairs, margins, train, evaluate]),
    ],
)
def test_wanted_stages(
    loss_type: str, sft_section: Any, expected: list[Any], raw_config: dict[str, Any]
) -> None:
    raw_config["train"]["loss_type"] = loss_type
    raw_config["sft"] = sft_section
    wanted = pipeline.wanted_stages(parse_config(raw_config))
    assert wanted == [module.STAGE for module in expected]
    assert tune.STAGE not in wanted


def test_rewards_can_be_asked_for(raw_config: dict[str, Any]) -> None:
    """To log margin/* metrics with another loss."""
    raw_config["train"]["loss_type"] = "ipo"
    raw_config["margins"] = {"with_rewards": True}
    assert reward.STAGE in pipeline.wanted_stages(parse_config(raw_config))
