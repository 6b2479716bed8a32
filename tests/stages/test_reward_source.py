"""Rewards that are not those of a model trained here."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from madpo_ray import pipeline
from madpo_ray.artifacts.manifest import differences
from madpo_ray.artifacts.tables import column_names, read_columns
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, pairs, reward, scores
from support.models import make_reward_model, make_tokenizer
from support.pairs import make_rows, write_jsonl

Run = tuple[Config, list[str]]


def with_source(raw: dict[str, Any], source: str, **more: Any) -> Config:
    raw["reward"] = {"source": source, **more}
    return parse_config(raw)


def classifier(folder: Path) -> Path:
    make_reward_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_reward_stage_is_not_wanted(raw_config: dict[str, Any], tmp_path: Path) -> None:
    config = with_source(raw_config, str(classifier(tmp_path / "judge")))
    assert reward.STAGE not in pipeline.wanted_stages(config)
    assert reward.STAGE not in margins.STAGE.upstream(config)
    pipeline.check(config, pipeline.wanted_stages(config))
    with pytest.raises(UserError, match="is not trained here: run stage margins"):
        reward.STAGE.check(config)


def test_inputs_follow_the_classifiers_files(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Not its path."""
    first = with_source(raw_config, str(classifier(tmp_path / "a")))
    second = with_source(raw_config, str(shutil.copytree(tmp_path / "a", tmp_path / "b")))
    assert margins.STAGE.inputs(first).fingerprint == margins.STAGE.inputs(second).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "chat_template.jinja").write_text("x")
    third = with_source(raw_config, str(tmp_path / "c"))
    assert margins.STAGE.inputs(third).fingerprint != margins.STAGE.inputs(first).fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", r"reward\.source: /no/such/folder is not a folder"),
        ("no.such:function", r"reward\.source: no\.such:function cannot be imported"),
    ],
)
def test_source_that_is_not_there_is_named(
    source: str, message: str, raw_config: dict[str, Any]
) -> None:
    config = with_source(raw_config, source)
    with pytest.raises(UserError, match=message):
        pipeline.check(config, pipeline.wanted_stages(config))


def test_language_model_is_no_source(raw_config: dict[str, Any], model_folder: Path) -> None:
    config = with_source(raw_config, str(model_folder))
    with pytest.raises(UserError, match=r"reward\.source: .* is not a sequence classifier, but a"):
        margins.STAGE.check(config)


@pytest.mark.parametrize(
    ("source", "ensemble", "message"),
    [
        ("trained", ["trained"], "trained is neither a classifier nor a function"),
        ("a/b", ["a/b"], "a member is listed twice"),
        ("trained", ["a/b", "a/b"], "a member is listed twice"),
    ],
)
def test_members_of_an_ensemble_are_checked(
    source: str, ensemble: list[str], message: str, raw_config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        with_source(raw_config, source, ensemble=ensemble)


def test_ensemble_is_no_matter_of_the_training(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Its members' content is one of the margins."""
    alone = with_source(raw_config, "trained")
    judge = str(classifier(tmp_path / "judge"))
    joined = with_source(raw_config, "trained", ensemble=[judge, "support.judges:fail_for_one"])
    assert reward.STAGE.inputs(alone) == reward.STAGE.inputs(joined)
    content = margins.STAGE.inputs(joined).content
    assert {"ensemble[0]", "ensemble[1]"} <= content.keys()
    assert "ensemble[0]" not in margins.STAGE.inputs(alone).content


def test_function_is_known_by_the_file_that_defines_it(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only by the one that the config names, which may import it."""
    package = tmp_path / "some_judges"
    package.mkdir()
    (package / "__init__.py").write_text("from some_judges.own import judge")
    (package / "own.py").write_text("def judge(prompts, completions):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = with_source(raw_config, "some_judges:judge")
    before = margins.STAGE.content(config)["reward"]
    assert len(before) == 2
    (package / "own.py").write_text("def judge(prompts, completions):\n    return [2.0]\n")
    assert margins.STAGE.content(config)["reward"] != before


def test_scores_are_of_all_members(raw_config: dict[str, Any]) -> None:
    """Other functions of the same file are other scores."""
    del raw_config["sft"]
    found = set()
    for source, ensemble in (
        ("support.judges:fail_for_one", []),
        ("support.judges:count_kind_words", []),
        ("support.judges:fail_for_one", ["support.judges:count_kind_words"]),
        ("support.judges:count_kind_words", ["support.judges:fail_for_one"]),
    ):
        config = with_source(raw_config, source, ensemble=ensemble)
        found.add(scores.passes_of(config)[0].inputs.fingerprint)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "go together"),
        ({"source_columns": ["a", "b", "c"]}, "at most 2 items"),
        ({"source_columns": ["nowhere"]}, "add it to data.keep_columns"),
    ],
)
def test_columns_are_checked(
    more: dict[str, Any], message: str, raw_config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        with_source(raw_config, "columns", **more)


@pytest.fixture
def copied_run(finished_run: Run, tmp_path: Path) -> dict[str, Any]:
    """The config of a copy of the finished run."""
    raw = finished_run[0].model_dump(mode="json")
    shutil.copytree(finished_run[0].run.folder, tmp_path / finished_run[0].run.name)
    raw["run"]["storage_path"] = str(tmp_path)
    raw["margins"]["calibration"] = "none"
    return raw


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "names", [["chosen_score", "rejected_score"], ["chosen_score"]], ids=["rewards", "margin"]
)
def test_data_may_bring_rewards_or_a_margin(names: list[str], copied_run: dict[str, Any]) -> None:
    """No reward model is trained or run, and the reference is not scored again."""
    config = with_source(copied_run, "columns", source_columns=names)
    before = (config.run.folder / "scores" / "reference" / "manifest.json").stat().st_mtime_ns
    assert [stage.name for stage in pipeline.pending(config)] == ["margins", "train", "evaluate"]
    pipeline.run_stage(config, margins.STAGE, say=lambda what: None)
    assert (
        config.run.folder / "scores" / "reference" / "manifest.json"
    ).stat().st_mtime_ns == before
    table = read_columns(margins.STAGE.rows(config), ["margin", "chosen_score", "rejected_score"])
    expected = table["chosen_score"]
    if len(names) > 1:
        expected = pc.subtract(expected, table["rejected_score"])
    assert table["margin"] == expected
    has_rewards = "chosen_reward" in column_names(margins.STAGE.rows(config))
    assert has_rewards == (len(names) > 1)


@pytest.mark.ray
@pytest.mark.deepspeed
def test_column_called_margin(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """It is kept under another name: the artifact's own `margin` is calibrated."""
    rows = [{**row, "margin": 4 * row["chosen_score"] - 1.5} for row in make_rows(60)]
    raw_config["data"] |= {
        "files": [str(write_jsonl(tmp_path / "in.jsonl", rows))],
        "keep_columns": ["margin as given", "chosen_score", "rejected_score"],
    }
    del raw_config["sft"]
    config = with_source(raw_config, "columns", source_columns=["given"])
    for stage in (pairs.STAGE, margins.STAGE):
        pipeline.run_stage(config, stage, say=lambda what: None)
    table = read_columns(margins.STAGE.rows(config), ["margin", "raw_margin", "given"])
    assert table["raw_margin"] == table["given"]
    assert set(table["given"].to_pylist()) == {2.5, -1.5}
    temperature = margins.STAGE.require(config)["calibration"]["temperature"]
    assert temperature != 1
    np.testing.assert_allclose(table["margin"], pc.divide(table["given"], temperature))


@pytest.mark.ray
@pytest.mark.deepspeed
def test_classifier_without_a_template_is_refused_before_training(
    copied_run: dict[str, Any], tmp_path: Path
) -> None:
    """As soon as the prompts are known to be messages."""
    judge = classifier(tmp_path / "judge")
    config = with_source(copied_run, str(judge))
    (judge / "chat_template.jinja").unlink()
    margins.STAGE.check(config)  # of a run over texts
    rows = make_rows(60, conversational=True)
    copied_run["data"]["files"] = [str(write_jsonl(tmp_path / "in.jsonl", rows))]
    copied_run["run"]["name"] = "messages"
    config = parse_config(copied_run)
    margins.STAGE.check(config)
    pipeline.run_stage(config, pairs.STAGE, say=lambda what: None)
    with pytest.raises(UserError, match=r"reward\.source: the prompts are messages, and the token"):
        margins.STAGE.check(config)


@pytest.mark.ray
@pytest.mark.deepspeed
def test_ensemble_scores_every_pair(copied_run: dict[str, Any], tmp_path: Path) -> None:
    """And another source redoes the margins, and names why."""
    judge = str(classifier(tmp_path / "judge"))
    config = with_source(copied_run, judge, ensemble=["support.judges:count_kind_words"])
    found = differences(margins.STAGE.folder(config), margins.STAGE.inputs(config))
    assert {difference.part for difference in found} == {"settings", "upstream", "content"}
    printed: list[str] = []
    pipeline.run_stage(config, margins.STAGE, say=lambda what: printed.append(str(what)))
    assert any("margins of a pair differ by a standard deviation of" in one for one in printed)
    rows = margins.STAGE.rows(config)
    assert pc.min(read_columns(rows, ["margin_std"])["margin_std"]).as_py() >= 0
    ids = read_columns(rows, ["pair_id"])
    assert ids == read_columns(pairs.STAGE.rows(config), ["pair_id"])
    table = read_columns(rows, ["chosen_reward", "rejected_reward", "margin"])
    difference = pc.subtract(table["chosen_reward"], table["rejected_reward"])
    assert table["margin"] == difference
    assert len(set(table["margin"].to_pylist())) > 50


@pytest.mark.ray
@pytest.mark.deepspeed
def test_pair_that_a_function_fails_for_is_rejected(copied_run: dict[str, Any]) -> None:
    """The others have their margins; too many such pairs end the command."""
    config = with_source(copied_run, "support.judges:fail_for_one")
    printed: list[str] = []
    pipeline.run_stage(config, margins.STAGE, say=lambda what: printed.append(str(what)))
    assert "margins:   1 x raised ValueError" in printed
    rejects = pq.read_table(margins.STAGE.folder(config) / "rejects.parquet").to_pylist()
    (reject,) = rejects
    assert reject["reason"] == "raised ValueError: this judge does not like sevens"
    counts = margins.STAGE.require(config)["counts"]
    assert (counts["read"], counts["written"]) == (90, 89)
    assert counts["rejected"] == {"raised ValueError": 1}

    rows = read_columns(margins.STAGE.rows(config), ["pair_id", "margin", "prompt"])
    assert reject["pair_id"] not in rows["pair_id"].to_pylist()
    assert rows.num_rows == 89
    assert not any(prompt.startswith("say 7:") for prompt in rows["prompt"].to_pylist())
    assert pc.all(pc.is_finite(rows["margin"])).as_py()

    copied_run["data"]["max_reject_fraction"] = 0.01
    shutil.rmtree(margins.STAGE.folder(config))
    config = with_source(copied_run, "support.judges:fail_for_one")
    with pytest.raises(UserError, match=r"1 of 90 pairs cannot be scored, more than data\.max"):
        pipeline.run_stage(config, margins.STAGE, say=lambda what: None)
