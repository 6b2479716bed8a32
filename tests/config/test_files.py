"""Reading a config: YAML, --set, paths, and errors that name the key and the fix."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from madpo_ray.config import (
    Config,
    PolicyConfig,
    load_config,
    parse_config,
    save_config,
    with_changes,
)
from madpo_ray.config.files import dump_config
from madpo_ray.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
MINIMAL = "model: {model_name_or_path: org/name}\ndata: {files: [a.jsonl]}\n"


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    assert isinstance(load_config(file), Config)


def test_overrides_and_floats(tmp_path: Path) -> None:
    """1e-5 is a float, as in YAML 1.2."""
    file = written(tmp_path, MINIMAL + "train: {learning_rate: 1e-5}\n")
    overrides = ["train.beta=5e-2", "data.files=[b.jsonl, c.jsonl]", "run.name=x"]
    config = load_config(file, overrides)
    assert config.train.learning_rate == 1e-5
    assert config.train.beta == 0.05
    assert [Path(name).name for name in config.data.files] == ["b.jsonl", "c.jsonl"]
    assert config.model.model_name_or_path == "org/name"


@pytest.mark.parametrize("override", ["beta=1", "train.beta", "train.beta.x=1", "train.beta=["])
def test_refuses_bad_overrides(tmp_path: Path, override: str) -> None:
    file = written(tmp_path, MINIMAL + "train: {beta: 0.1}\n")
    with pytest.raises(UserError, match="--set"):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must hold sections"),
        ("train: {beta: 0.1}\nmodel: {}\ntrain: {tau: 1.0}\n", "'train' appears twice, in lines 1"),
        (
            "train:\n  beta: 0.1\n  tau: 1.0\n  beta: 0.2\n",
            "'beta' appears twice, in lines 2 and 4",
        ),
        (MINIMAL + "x: &x {}\ntrain:\n  <<: *x\n  <<: *x\n", "'<<' appears twice"),
        ("train: 2020-13-45", r"train: Input should be a valid dictionary.*2020-13-45"),
        ("train: {[a]: 1}", "line 1: a key is not a name"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_refuses_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1:30", "1:30"),  # YAML 1.1's 90
        ("010", 10),  # its 8
        ("1_000", "1_000"),  # its 1000
        ("on", "on"),  # its true
        ("2026-01-01", "2026-01-01"),  # its date
        ("0o17", 15),
        ("0x1F", 31),
        ("-.inf", float("-inf")),
        ("~", None),
        ("", None),
        ("TRUE", True),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    """A text where a number is wanted is an error; it never becomes another number."""
    file = written(tmp_path, MINIMAL + f"train: {{beta: {text}}}\n")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 100:
        assert load_config(file).train.beta == value
    else:
        with pytest.raises(UserError, match=r"train\.beta: .*") as error:
            load_config(file)
        assert f"(given: {value!r})" in str(error.value)


@pytest.mark.parametrize("name", ["1e5", "010", "on", "null", "0x1", "2026-01-01", "1.5"])
def test_names_that_look_like_numbers_are_saved_as_texts(
    name: str, raw_config: dict[str, Any], tmp_path: Path
) -> None:
    raw_config["run"]["name"] = name
    config = parse_config(raw_config)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_override_changes_one_of_two_aliased_sections(tmp_path: Path) -> None:
    file = written(tmp_path, MINIMAL + "train: &a {lora_r: 4}\nreward: *a\n")
    config = load_config(file, ["train.lora_r=8"])
    assert (config.train.lora_r, config.reward.lora_r) == (8, 4)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "not-utf-8-\udcff"])
@pytest.mark.parametrize("key", ["run.storage_path", "model.model_name_or_path"])
def test_refuses_impossible_paths(raw_config: dict[str, Any], key: str, path: str) -> None:
    section, name = key.split(".")
    raw_config[section][name] = path
    with pytest.raises(UserError, match=f"{key}: .* is not a possible path"):
        parse_config(raw_config)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    """Also in an anchor that is merged again."""
    text = MINIMAL + (
        "sft: &a {learning_rate: 1e-3, lora_r: 4}\n"
        "reward: &b\n  <<: *a\n  lora_r: 8\n"
        "train:\n  <<: [*b, *a]\n  beta: 0.5\n"
    )
    config = load_config(written(tmp_path, text))
    assert config.sft is not None
    assert (config.sft.lora_r, config.reward.lora_r, config.train.lora_r) == (4, 8, 8)
    assert config.train.learning_rate == 1e-3


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "/data")
    config = parse_config(
        {
            "model": {"model_name_or_path": "./m", "chat_template_path": "~/t.jinja"},
            "data": {"files": ["a.jsonl", "$DATA/b.jsonl", "${DATA}/c.jsonl"]},
            "evaluate": {"judge": "./judge", "compare_with": ["runs/other"]},
        }
    )
    assert config.model.model_name_or_path == str(tmp_path / "m")
    assert config.model.chat_template_path == str(Path.home() / "t.jinja")
    assert config.data.files == (str(tmp_path / "a.jsonl"), "/data/b.jsonl", "/data/c.jsonl")
    assert config.run.folder == tmp_path / "runs" / "madpo"
    assert config.evaluate.judge == str(tmp_path / "judge")
    assert config.evaluate.compare_with == (str(tmp_path / "runs" / "other"),)


@pytest.mark.parametrize("path", ["$NOT_SET/x", "${NOT_SET}/x"])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("data", "files"),
        ("run", "storage_path"),
        ("model", "model_name_or_path"),
        ("model", "chat_template_path"),
        ("evaluate", "judge"),
        ("evaluate", "compare_with"),
    ],
)
def test_refuses_unset_variables(
    section: str, key: str, path: str, raw_config: dict[str, Any]
) -> None:
    raw_config[section][key] = path
    with pytest.raises(UserError, match=rf"{section}\.{key}: .*NOT_SET.* is not set"):
        parse_config(raw_config)


def test_a_single_string_is_a_list_of_one(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL), ["data.files=b.jsonl"])
    assert [Path(name).name for name in config.data.files] == ["b.jsonl"]


def test_saved_config_loads_again(config: Config, tmp_path: Path) -> None:
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_changes_are_checked() -> None:
    assert with_changes(PolicyConfig(), "train", {"beta": 0.3}).beta == 0.3
    with pytest.raises(UserError, match=r"train\.c_min: must be strictly between"):
        with_changes(PolicyConfig(), "train", {"c_min": 1.0})
    with pytest.raises(UserError, match=r"unknown key train\.bta; did you mean 'beta'"):
        with_changes(PolicyConfig(), "train", {"bta": 1.0})


def test_saved_sections_keep_their_order(config: Config) -> None:
    assert list(yaml.safe_load(dump_config(config))) == list(Config.model_fields)


def test_merged_keys_without_own_ones(tmp_path: Path) -> None:
    text = MINIMAL + "reward: &b {lora_r: 8}\ntrain: {<<: *b}\n"
    assert load_config(written(tmp_path, text)).train.lora_r == 8


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("org/name", False),
        ("name", False),
        ("a/b/c", True),
        ("model.gguf", True),
        ("./name", True),
        ("../name", True),
        ("/a", True),
    ],
)
def test_paths_and_hub_names(name: str, is_path: bool, raw_config: dict[str, Any]) -> None:
    raw_config["model"]["model_name_or_path"] = name
    found = parse_config(raw_config).model.model_name_or_path
    assert found == (os.path.abspath(name) if is_path else name)


@pytest.mark.parametrize("name", ["/$NOT_SET", "$NOT_SET", "~/$NOT_SET"])
def test_variables_in_models_are_expanded(name: str, raw_config: dict[str, Any]) -> None:
    raw_config["model"]["model_name_or_path"] = name
    with pytest.raises(UserError, match="NOT_SET is not set"):
        parse_config(raw_config)


@pytest.mark.parametrize("value", ["x #1", "&x y"])
def test_overrides_lose_no_text(value: str, tmp_path: Path) -> None:
    """To YAML the rest is a comment, or a name."""
    file = written(tmp_path, MINIMAL)
    with pytest.raises(UserError, match="put the value into quotes"):
        load_config(file, [f"run.storage_path={value}"])
    assert load_config(file, [f"run.storage_path='{value}'"]).run.folder.parent.name == value


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://server/a.jsonl", "use s3://"),
        ("hf://buckets/a.jsonl", "hf://datasets/"),
        ("", "the path is empty"),
        ("${A:-x}/a", "only ~, "),
        ("$(pwd)/a", "only ~, "),
        ("~nobody_of_this_name/a", "only ~, "),
    ],
)
def test_refuses_what_is_not_expanded(path: str, message: str, raw_config: dict[str, Any]) -> None:
    raw_config["data"]["files"] = [path]
    with pytest.raises(UserError, match=rf"data\.files: .*{message}"):
        parse_config(raw_config)


@pytest.mark.parametrize(
    ("name", "is_on_the_hub"),
    [
        ("Anthropic/hh-rlhf", True),
        ("trl-lib/ultrafeedback_binarized@v1.0", True),
        ("owner/pairs.v2", True),
        ("owner/pairs.jsonl", False),
        ("owner/pairs.jsonl.gz", False),
        ("Owner/Pairs.JSONL", False),
        ("owner/pairs.feather", False),
        ("here/pairs", False),
        ("./owner/pairs", False),
        ("owner/*", False),
        ("pairs", False),
    ],
)
def test_names_of_data_sets_on_the_hub(
    name: str,
    is_on_the_hub: bool,
    raw_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder that is here comes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    raw_config["data"]["files"] = [name]
    (found,) = parse_config(raw_config).data.files
    assert found == (f"hf://datasets/{name}" if is_on_the_hub else os.path.abspath(name))


@pytest.mark.parametrize(
    "name",
    [
        "s3://key:secret@bucket/a.jsonl",
        "s3://key:sec/ret@bucket/a",
        "gs://secret@bucket/a",
        "s3://anonymous@sec/a",
    ],
)
def test_credentials_are_not_shown(name: str, raw_config: dict[str, Any]) -> None:
    raw_config["data"]["files"] = [name]
    with pytest.raises(UserError, match="holds credentials") as error:
        parse_config(raw_config)
    assert "sec" not in str(error.value)
    raw_config["data"]["files"] = ["gs://anonymous@bucket/a.jsonl"]
    assert parse_config(raw_config).data.files == ("gs://anonymous@bucket/a.jsonl",)


def test_config_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(MINIMAL.encode() + b"run: {name: \xe4}\n")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        load_config(file)


def test_half_of_a_surrogate_pair_is_no_path(raw_config: dict[str, Any]) -> None:
    raw_config["data"]["files"] = ["\ud83d.jsonl"]
    with pytest.raises(UserError, match=r"data\.files: .* is not a possible path"):
        parse_config(raw_config)


def test_required_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"^data is required$"):
        parse_config({"model": {"model_name_or_path": "org/name"}})
