"""Stage train: what it asks for."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from madpo_ray.artifacts.tables import write_table
from madpo_ray.columns import MARGIN, REF_LOGPS
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, train
from madpo_ray.stages.stage import Build


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_refuses_bad_pair_weights(weight: float, config: Config) -> None:
    table = pa.table(
        {
            "pair_id": ["a", "b"],
            "split": ["train", "validation"],
            "chosen_score": [0.0, weight],
        }
    )
    write_table(table, margins.STAGE.rows(config))
    settings = config.train.model_copy(update={"weight_column": "chosen_score"})
    config = config.model_copy(update={"train": settings})
    message = "chosen_score is missing, negative or not finite for 1 pairs, such as b"
    with pytest.raises(UserError, match=message):
        train.check_pair_weights(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (MARGIN, *REF_LOGPS)),
        ({"loss_type": "sigmoid"}, REF_LOGPS),
        ({"weight_column": "chosen_score"}, (MARGIN, *REF_LOGPS, "chosen_score")),
    ],
)
def test_reads_the_columns_of_its_loss(
    changes: dict[str, Any], expected: tuple[str, ...], raw_config: dict[str, Any]
) -> None:
    del raw_config["sft"]
    raw_config["train"] |= changes
    config = parse_config(raw_config)
    job = train.policy_job(Build(config, Path("out"), "0" * 64))
    assert job.task.columns == expected
    assert job.name == "train-" + "0" * 16


def test_reads_margins_that_were_asked_for(raw_config: dict[str, Any]) -> None:
    """So that margin/* metrics appear."""
    del raw_config["sft"]
    raw_config["train"]["loss_type"] = "ipo"
    raw_config["margins"] = {"with_rewards": True}
    job = train.policy_job(Build(parse_config(raw_config), Path("out"), "0" * 64))
    assert job.task.columns == (*REF_LOGPS, MARGIN)


@pytest.mark.parametrize(("loss_type", "depends"), [("beta_dpo", True), ("madpo", False)])
def test_only_beta_dpo_depends_on_the_workers(
    loss_type: str, depends: bool, raw_config: dict[str, Any]
) -> None:
    """Its statistics are of a micro-batch of all of them."""
    raw_config["train"]["loss_type"] = loss_type
    one = train.STAGE.inputs(parse_config(raw_config)).fingerprint
    raw_config["cluster"]["num_workers"] = 1
    other = train.STAGE.inputs(parse_config(raw_config)).fingerprint
    assert (one != other) is depends
