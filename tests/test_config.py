"""The config: strict, with messages that say how to mend it, and light to import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Edit

from madpo_ray.config import Config, UserError, numerics_of, settings_of
from madpo_ray.config_file import load_config, parse_config

ROOT = Path(__file__).parent.parent


def test_import_is_light() -> None:
    heavy = "('torch', 'ray', 'deepspeed', 'transformers')"
    code = f"import sys, madpo_ray.config; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_parse(file: Path) -> None:
    assert isinstance(load_config(file), Config)


def set_in(section: str, key: str, value: Any) -> Edit:
    return lambda raw: raw.setdefault(section, {}).update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in("train", "learning_rat", 1.0), "unknown key train.learning_rat; did you mean 'learning_rate'?"),
        (set_in("trian", "beta", 1.0), "unknown key trian; did you mean 'train'?"),
        (set_in("tune", "search_space", {"bta": {"min": 0.1, "max": 1.0}}), "did you mean 'beta'?"),
        (set_in("tune", "search_space", {"beta": {"mini": 0.1, "max": 1.0}}), "did you mean 'min'?"),
        (set_in("train", "c_min", 1.0), "MADPO is DPO"),
        (set_in("train", "c_min", 0.0), "strictly between 0 and 1"),
        (set_in("train", "c_max", 1.0), "MADPO is DPO"),
        (set_in("train", "tau", 0.0), "must be above 0"),
        (set_in("train", "beta", "0.1"), "train.beta: Input should be a valid number"),
        (set_in("train", "loss_type", "madop"), "'madpo'"),
        (set_in("evaluate", "chosen_score_column", None), "go together"),
        (set_in("data", "files", []), "at least 1 item"),
        (set_in("run", "storage_path", "s3://bucket/runs"), "is a URI"),
        (set_in("train", "tau", float("inf")), "finite"),
        (set_in("train", "label_smoothing", 0.1), "belongs to loss_type sigmoid"),
        (set_in("data", "keep_columns", ["margin"]), "rename it"),
        (set_in("tune", "search_space", {"lora_r": {"min": 4.0, "max": 8.0}}), "no real number"),
        (set_in("reward", "lora_layers_to_transform", [1]), "by name"),
        (set_in("model", "attn_implementation", "flex_attention"), "flex_attention trains on GPUs only"),
    ],
)
def test_bad_values_say_how_to_mend_them(raw_config: dict[str, Any], edit: Edit, message: str) -> None:
    edit(raw_config)
    with pytest.raises(UserError, match=r".*") as error:
        parse_config(raw_config)
    assert message in str(error.value)


def test_overrides_and_floats_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {model_name_or_path: org/name}\ndata: {files: [a.jsonl]}\ntrain: {learning_rate: 1e-5}\n")
    config = load_config(file, ["train.beta=5e-2", "data.files=[b.jsonl, c.jsonl]", "run.name=x"])
    assert config.train.learning_rate == 1e-5
    assert config.train.beta == 0.05
    assert [Path(name).name for name in config.data.files] == ["b.jsonl", "c.jsonl"]
    assert config.model.model_name_or_path == "org/name"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({"model": {"model_name_or_path": "./m"}, "data": {"files": ["a.jsonl"]}})
    assert config.model.model_name_or_path == str(tmp_path / "m")
    assert config.data.files == (str(tmp_path / "a.jsonl"),)
    assert config.run.folder == tmp_path / "runs" / "madpo"


@pytest.mark.parametrize("override", ["beta=1", "train.beta", "train.beta.x=1"])
def test_overrides_that_cannot_be_read(raw_config: dict[str, Any], tmp_path: Path, override: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {model_name_or_path: org/name}\ndata: {files: [a.jsonl]}\ntrain: {beta: 0.1}\n")
    with pytest.raises(UserError, match="--set"):
        load_config(file, [override])


def test_a_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="no valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_frozen(config: Config) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.train.beta = 1.0  # type: ignore[misc]


def test_patience_and_the_best_metric(raw_config: dict[str, Any]) -> None:
    raw_config["train"] |= {"early_stopping_patience": 2, "metric_for_best_model": "rewards/accuracies"}
    with pytest.raises(UserError, match="early_stopping_patience needs metric_for_best_model"):
        parse_config(raw_config)
    raw_config["train"]["eval_steps"] = 5
    assert parse_config(raw_config).train.best_metric == ("eval_rewards/accuracies", True)
    raw_config["train"]["metric_for_best_model"] = "eval_loss"
    assert parse_config(raw_config).train.best_metric == ("eval_loss", False)
    raw_config["train"]["metric_for_best_model"] = "accuracy"
    with pytest.raises(UserError, match="no 'accuracy' is measured; did you mean 'rewards/accuracies'"):
        parse_config(raw_config)


def test_evaluations_count_for_the_numbers_only_where_they_choose_the_result(config: Config) -> None:
    often = config.train.model_copy(update={"eval_steps": 3})
    assert settings_of(often) == settings_of(config.train)
    best = config.train.model_copy(update={"metric_for_best_model": "eval_loss"})
    assert settings_of(best) != settings_of(best.model_copy(update={"eval_steps": 3}))


@pytest.mark.parametrize(("stage", "key"), [(1, "offload_optimizer"), (2, "offload_param")])
def test_offloading_needs_shards(stage: int, key: str, raw_config: dict[str, Any]) -> None:
    raw_config["train"] |= {"zero_stage": stage, key: True}
    with pytest.raises(UserError, match="offload_param zero_stage 3"):
        parse_config(raw_config)
    raw_config["train"]["zero_stage"] = 3
    assert getattr(parse_config(raw_config).train, key)


def test_four_bits_are_for_an_adapter_on_gpus(raw_config: dict[str, Any]) -> None:
    raw_config["model"]["load_in_4bit"] = True
    with pytest.raises(UserError, match=r"model\.load_in_4bit needs cluster\.use_gpu, train\.use_peft"):
        parse_config(raw_config)
    del raw_config["sft"]
    raw_config["train"]["use_peft"] = raw_config["cluster"]["use_gpu"] = True
    assert numerics_of(parse_config(raw_config).model)["load_in_4bit"]


def test_a_weight_column_is_kept(raw_config: dict[str, Any]) -> None:
    raw_config["train"]["weight_column"] = "importance"
    with pytest.raises(UserError, match=r"train asks for column 'importance': add it to data\.keep_columns"):
        parse_config(raw_config)
