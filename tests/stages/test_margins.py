"""Stage margins of a finished run: rewards, margins, reference log-probs, and what is redone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from madpo_ray import columns, pipeline
from madpo_ray.artifacts.tables import (
    column_names,
    read_columns,
    read_split,
    rows_files,
)
from madpo_ray.config import Config, ForwardOptions, SFTConfig, parse_config
from madpo_ray.data.batching import collate
from madpo_ray.data.splits import group_hash
from madpo_ray.errors import UserError
from madpo_ray.models.loading import load_policy
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.scoring.calibration import calibration_report
from madpo_ray.scoring.scaling import fit_temperature
from madpo_ray.scoring.scorers import TrainedReward
from madpo_ray.stages import margins, pairs, reward, scores, sft
from support.models import TEMPLATE
from support.pairs import make_rows, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

Run = tuple[Config, list[str]]


def calibration(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = margins.STAGE.require(config)["calibration"]
    return found


def test_holds_every_pair_once(finished_run: Run) -> None:
    config, _ = finished_run
    before = read_columns(pairs.STAGE.rows(config), ["pair_id"])["pair_id"].to_pylist()
    after = read_columns(margins.STAGE.rows(config), ["pair_id"])["pair_id"].to_pylist()
    assert len(before) == len(set(before)) == 90
    assert after == before


def test_margins_are_differences_in_calibrated_units(finished_run: Run) -> None:
    config, _ = finished_run
    names = ("margin", "chosen_reward", "rejected_reward")
    table = read_columns(margins.STAGE.rows(config), names)
    differences = pc.subtract(table["chosen_reward"], table["rejected_reward"])
    assert differences.to_pylist() == table["margin"].to_pylist()

    # The temperature is that of the validation pairs' raw margins.
    own = read_columns(config.run.folder / "scores" / "reward" / "data", ["pair_id", *names[1:]])
    splits = read_columns(margins.STAGE.rows(config), ["split"])["split"]
    held_out = own.filter(pc.equal(splits, "validation"))
    raw = pc.subtract(held_out["chosen_reward"], held_out["rejected_reward"]).to_numpy()
    report = calibration(config)
    assert report["temperature"] == fit_temperature(raw)
    assert report["temperature"] != 1.0
    assert report["validation_pairs"] == held_out.num_rows
    assert report["accuracy"] > 0.6
    expected = pc.divide(own["rejected_reward"], report["temperature"])
    assert table["rejected_reward"].to_pylist() == expected.to_pylist()

    # The raw ones are there, too.
    stored = read_columns(margins.STAGE.rows(config), ["raw_margin"])["raw_margin"]
    raw_margins = pc.subtract(own["chosen_reward"], own["rejected_reward"])
    assert stored.to_pylist() == raw_margins.to_pylist()


def test_reward_model_scores_the_same_in_transformers(finished_run: Run) -> None:
    """Right-padded, with the saved tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config, _ = finished_run
    folder = reward.STAGE.folder(config) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("prompt_ids", "chosen_ids", "chosen_reward")
    rows = read_split(margins.STAGE.rows(config), "test", names).slice(0, 4).to_pylist()
    texts = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        scores = model(**padded).logits[:, 0] / calibration(config)["temperature"]
    stored = torch.tensor([row["chosen_reward"] for row in rows])
    torch.testing.assert_close(scores, stored, rtol=1e-4, atol=1e-5)


def test_reference_log_probs_are_the_models_own(finished_run: Run) -> None:
    config, _ = finished_run
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    rows = read_split(margins.STAGE.rows(config), "train", names).slice(0, 6).to_pylist()
    policy = load_policy(sft.initial_policy(config), config.model).eval()
    with torch.no_grad():
        logps = ResponseLogps(policy)(collate(rows, packed=False))["logps"]
    stored = [row[f"ref_{side}_logps"] for side in ("chosen", "rejected") for row in rows]
    expected = torch.tensor(stored, dtype=torch.float64)
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-4)


def manifests(config: Config) -> dict[str, int]:
    """When each scorer's artifact was made."""
    folder = config.run.folder / "scores"
    return {
        name: (folder / name / "manifest.json").stat().st_mtime_ns
        for name in ("reward", "reference")
    }


@pytest.fixture
def copied_run(finished_run: Run, tmp_path: Path) -> dict[str, Any]:
    """The config of a copy of the finished run."""
    config, _ = finished_run
    shutil.copytree(config.run.folder, tmp_path / "tiny", symlinks=True)
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(tmp_path)
    return raw


def run_margins(raw: dict[str, Any], *stages: Any) -> Config:
    config = parse_config(raw)
    for stage in (*stages, margins.STAGE):
        pipeline.run_stage(config, stage, say=lambda what: None)
    return config


def test_other_calibration_scores_nothing_again(copied_run: dict[str, Any]) -> None:
    before = manifests(parse_config(copied_run))
    copied_run["margins"] = {"calibration": "none", "rows_per_file": 40}
    config = run_margins(copied_run)
    assert manifests(config) == before
    assert [pq.read_metadata(file).num_rows for file in rows_files(margins.STAGE.rows(config))] == [
        40,
        40,
        10,
    ]
    first, *_ = rows_files(margins.STAGE.rows(config))
    origin = json.loads(pq.read_schema(first).metadata[b"madpo_ray"])
    assert origin["fingerprint"] == margins.STAGE.inputs(config).fingerprint
    assert origin["made_from"].keys() == {"pairs", "reward", "initial_policy"}
    assert origin["calibration"]["method"] == "none"
    assert origin["max_length"] == 64
    assert origin["over_length"] == "truncate"
    assert origin["model"]["model_name_or_path"] == config.model.model_name_or_path
    assert origin["chat_template"] == TEMPLATE
    own = read_columns(config.run.folder / "scores" / "reward" / "data", ["chosen_reward"])
    stored = read_columns(margins.STAGE.rows(config), ["chosen_reward"])
    assert stored.equals(own)


def test_isotonic_calibration(copied_run: dict[str, Any]) -> None:
    """Margins are those of the fitted function, and rewards stay in their own units."""
    copied_run["margins"] = {"calibration": "isotonic"}
    config = run_margins(copied_run)
    scaling = scores.scaling(calibration(config), config)
    assert len(scaling.knots) > 1
    table = read_columns(margins.STAGE.rows(config), ["margin", "raw_margin", *columns.REWARDS])
    raw = table["raw_margin"].to_numpy()
    np.testing.assert_array_equal(table["margin"].to_numpy(), scaling(raw))
    chosen, rejected = (table[name].to_numpy() for name in columns.REWARDS)
    np.testing.assert_array_equal(chosen - rejected, raw)


@pytest.mark.slow
def test_other_reward_model_keeps_the_reference_pass(copied_run: dict[str, Any]) -> None:
    before = manifests(parse_config(copied_run))
    copied_run["reward"] |= {"max_steps": 18}
    after = manifests(run_margins(copied_run, reward.STAGE))
    assert after["reference"] == before["reference"]
    assert after["reward"] > before["reward"]


@pytest.mark.slow
def test_other_initial_policy_keeps_the_reward_pass(copied_run: dict[str, Any]) -> None:
    old = parse_config(copied_run)
    before = manifests(old)
    logps = read_columns(margins.STAGE.rows(old), ["ref_chosen_logps", "margin"])
    shared = {k: v for k, v in copied_run["reward"].items() if k in SFTConfig.model_fields}
    copied_run["sft"] = {**shared, "use_peft": False, "max_steps": 2}
    config = run_margins(copied_run, sft.STAGE)
    after = manifests(config)
    assert after["reward"] == before["reward"]
    assert after["reference"] > before["reference"]
    new = read_columns(margins.STAGE.rows(config), ["ref_chosen_logps", "margin"])
    assert new["margin"].equals(logps["margin"])
    assert not new["ref_chosen_logps"].equals(logps["ref_chosen_logps"])


def test_without_rewards_there_are_no_margins(copied_run: dict[str, Any]) -> None:
    """Nothing is scored again for it."""
    before = manifests(parse_config(copied_run))
    copied_run["train"]["loss_type"] = "sigmoid"
    config = run_margins(copied_run)
    assert manifests(config) == before
    assert "margin" not in column_names(margins.STAGE.rows(config))
    assert margins.STAGE.require(config)["calibration"] is None


def test_optimism_is_reported() -> None:
    """Of a reward model that has seen the training pairs, only."""
    numbers = {"pairs": 4, "margin": 0.5}
    splits = {
        "train": {**numbers, "negative_fraction": 0.05},
        "validation": {**numbers, "negative_fraction": 0.25},
    }
    report = {"accuracy": 0.75, "accuracy_interval": (0.3, 0.9), "reason": "r"}
    results = {"splits": splits, "calibration": report, "rejects": {}}
    shown = (
        "positive margins: 95.0% of the training pairs, which the reward model has seen, and 75.0%"
    )
    for is_in_sample in (True, False):
        lines = margins.describe({**results, "is_in_sample": is_in_sample})
        assert any(str(line).startswith(shown) for line in lines) == is_in_sample


def test_description() -> None:
    """One line for the calibration, and one per split that has pairs."""
    splits = {
        "train": {"pairs": 4, "margin": 0.5, "negative_fraction": 0.25},
        "validation": {"pairs": 0, "margin": None, "negative_fraction": None},
    }
    report = {"accuracy": 0.75, "accuracy_interval": (0.3, 0.9), "reason": "r"}
    results = {"splits": splits, "calibration": report, "rejects": {"nan": 2}}
    results |= {"mean_weight": {"train": 0.75, "test": 1.0}, "weights_at": {"c_max": 4.0}}
    results["weights_by_label"] = {"wrong": {"pairs": 3, "mean_weight": 0.5}}
    results["alarms"] = ["ALARM: it burns"]
    lines = margins.describe(results)
    assert lines[0].endswith("0.750 (95 % 0.300 to 0.900); not calibrated: r")
    assert lines[1:] == [
        "train: 4 pairs, mean margin 0.500, 25.0% negative",
        "mean weight 0.750 train, 1.000 test at c_max 4; 1 for calibrated margins below tau",
        "mean weight by the true scores: 0.500 over 3 pairs whose label is wrong",
        "ALARM: it burns",
        "2 pairs could not be scored, listed in rejects.parquet:",
        "  2 x nan",
    ]


def test_description_of_errors_that_were_not_measured() -> None:
    calibration = calibration_report(np.array([-1.0] + [2.0] * 9))
    lines = margins.describe({"splits": {}, "calibration": calibration, "rejects": {}})
    assert str(lines[0]).endswith("the pairs are too few to measure the errors after it")


@pytest.mark.slow
def test_uncalibratable_margins_are_refused(copied_run: dict[str, Any]) -> None:
    """A model at chance; margins.calibration: none uses its margins as they are."""
    copied_run["reward"] |= {"max_steps": 1, "learning_rate": 1e-12}
    with pytest.raises(UserError, match=r"cannot be calibrated.*margins\.calibration: none"):
        run_margins(copied_run, reward.STAGE)
    copied_run["margins"] = {"calibration": "none"}
    config = run_margins(copied_run)
    assert read_columns(margins.STAGE.rows(config), ["margin"]).num_rows == 90


@pytest.mark.slow
def test_cross_fitted_margins(copied_run: dict[str, Any]) -> None:
    """Each pair's rewards are those of the model that was trained without its group."""
    copied_run["reward"] |= {"folds": 2}
    copied_run["margins"] = {"calibration": "none"}
    config = run_margins(copied_run, reward.STAGE)
    names = ["prompt_ids", "chosen_ids", "rejected_ids", "group", "group_hash", "fold"]
    rows = read_columns(margins.STAGE.rows(config), [*names, *columns.REWARDS])
    assert [group_hash(group) % 2 for group in rows["group"].to_pylist()] == rows[
        "fold"
    ].to_pylist()

    folders = reward.models(config)
    assert len(set(folders)) == 2
    scored = np.full((2, rows.num_rows), np.nan)
    for fold, folder in enumerate(folders):
        scorer = TrainedReward(
            folder, config.model, columns=columns.REWARDS, forward=ForwardOptions(4)
        )
        scorer.load(torch.device("cpu"))
        members = np.flatnonzero(rows["fold"].to_numpy() == fold)
        assert 20 < len(members) < 70
        scored[:, members] = scorer(rows.take(members))
    stored = np.stack([rows[name].to_numpy() for name in columns.REWARDS])
    np.testing.assert_allclose(scored, stored, atol=1e-5)


@pytest.mark.slow
def test_reward_model_of_a_fold_does_not_see_the_folds_pairs(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """With their labels turned round it is the same to the last bit, and the other one is not."""
    raw_config["reward"] |= {"folds": 2, "num_train_epochs": 1}
    weights = []
    for name, turned in (("labels", None), ("turned", 0)):
        rows = []
        for row in make_rows(60):
            if group_hash(json.dumps(row["prompt"])) % 2 == turned:
                row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
            rows.append(row)
        raw_config["data"]["files"] = [str(write_jsonl(tmp_path / f"{name}.jsonl", rows))]
        raw_config["run"]["name"] = name
        config = parse_config(raw_config)
        for stage in (pairs.STAGE, reward.STAGE):
            pipeline.run_stage(config, stage, say=lambda what: None)
        weights.append([load_file(one / "model.safetensors") for one in reward.models(config)])

    is_same = [
        all(before[key].equal(after[key]) for key in before)
        for before, after in zip(*weights, strict=True)
    ]
    assert is_same == [True, False]
