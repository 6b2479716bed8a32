"""The command: help, exit codes, and one message for each kind of bad input."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from madpo_ray import pipeline
from madpo_ray.cli import app, exit_codes
from madpo_ray.config import Config
from madpo_ray.errors import ExitCode, Stopped, UserError
from support.pairs import Edit, write_jsonl

runner = CliRunner()


def call(raw: dict[str, Any], tmp_path: Path, *arguments: str) -> Any:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    command, *more = arguments or ("run",)
    return runner.invoke(app, [command, "--config", str(file), *more])


def test_help_names_every_stage() -> None:
    shown = runner.invoke(app, ["--help"]).output
    for stage in pipeline.STAGES:
        assert stage.name in shown
    assert "--dry-run" in runner.invoke(app, ["train", "--help"]).output


def test_dry_run_writes_nothing(raw_config: dict[str, Any], tmp_path: Path) -> None:
    done = call(raw_config, tmp_path, "run", "--dry-run", "--set", "train.max_steps=7")
    assert done.exit_code == 0, done.output
    assert "steps of train: 7" in done.output
    assert "idle" not in done.output
    assert "workers: 2, each 1 CPUs" in done.output
    assert "rows, at most: 90 in " in done.output
    assert "stages to do: pairs, sft, reward, margins, train, evaluate" in done.output
    assert "needed before" not in done.output
    assert not (tmp_path / "tiny").exists()


def test_dry_run_of_one_command(raw_config: dict[str, Any], tmp_path: Path) -> None:
    train = call(raw_config, tmp_path, "train", "--dry-run").output
    assert "stages to do: train\nneeded before: sft, margins (or use madpo-ray run)\n" in train
    assert "steps of reward" not in train
    tune = call(raw_config, tmp_path, "tune", "--dry-run").output
    assert "trials: 8 over train.beta, train.c_min, train.c_max, as many at a time as fit" in tune
    assert "stages to do: tune\nneeded before: sft, margins" in tune


def test_search_is_refused_for_what_comes_after_it(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """Not after hours of it."""
    raw_config["data"]["test_fraction"] = 0.0
    assert call(raw_config, tmp_path, "tune", "--dry-run").exit_code == 0
    done = call(raw_config, tmp_path, "tune", "--dry-run", "--retrain")
    assert done.exit_code == 2
    assert "split test has no pairs to evaluate on" in done.output


def test_dry_run_reports_idle_workers(raw_config: dict[str, Any], tmp_path: Path) -> None:
    override = "train.per_device_train_batch_size=3"
    done = call(raw_config, tmp_path, "run", "--dry-run", "--set", override)
    expected = (
        "idle in train: 1 of 4 micro-batches of a step are empty; a multiple of 6 pairs fills all"
    )
    assert expected in done.output


def edit(section: str, key: str, value: Any) -> Edit:
    return lambda raw: raw[section].update({key: value})


BAD = {
    "missing file": (edit("data", "files", ["/nowhere.jsonl"]), "/nowhere.jsonl does not exist"),
    "missing column": (edit("data", "group_column", "grup"), "no column 'grup'"),
    "unknown key": (edit("train", "bta", 0.1), "unknown key train.bta; did you mean 'beta'?"),
    "c_min of 1": (edit("train", "c_min", 1.0), "train.c_min"),
    "c_max of 1": (edit("train", "c_max", 1.0), "train.c_max"),
    "c_min of 0": (edit("train", "c_min", 0.0), "train.c_min"),
    "tau of 0": (edit("train", "tau", 0.0), "train.tau"),
    "read-only": (edit("run", "storage_path", "/proc/nothing"), "cannot write to the run's folder"),
    "no model": (edit("model", "model_name_or_path", "/no/model"), "not a folder with a config"),
    "no GGUF": (edit("model", "model_name_or_path", "/no/m.gguf"), "/no/m.gguf does not exist"),
    "no template": (edit("model", "chat_template_path", "/no.jinja"), "/no.jinja does not exist"),
    "many workers": (edit("cluster", "num_workers", 4000), "can never be placed"),
    "no margins": (edit("margins", "with_rewards", False), "train.loss_type madpo needs margins"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_2(name: str, raw_config: dict[str, Any], tmp_path: Path) -> None:
    """With one message, and before anything is built."""
    change, message = BAD[name]
    raw_config["margins"] = {}
    change(raw_config)
    done = call(raw_config, tmp_path)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "tiny" / "pairs").exists()


WORDS = [
    *("", "~", "$HOME", "${NOT_SET}/x", "a/b", "../x", "x" * 300, "a\0b", "\ud83d", "naïve", "1e5"),
    *("all-linear", "eval_loss", "prompt", "chosen", "chosen_score", "q_proj", "norm", "lm_head"),
    *("/proc/x", "/nowhere.jsonl", "x.parquet"),
]
NUMBERS = [0, 1, 2, 3, 7, -1, 10**9, 2**63, 10**400, 0.5, 1e-8, 1e308, -0.0]
ANYTHING = st.recursive(
    st.sampled_from([*WORDS, *NUMBERS]) | st.booleans() | st.none() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def of_kind(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a key's schema allows, or almost."""
    if "anyOf" in schema:
        return st.one_of([of_kind(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    kinds = {
        "integer": st.integers(int(low), int(low) + 20),
        "number": st.floats(low, low + 2) | st.sampled_from([1e-8, 0.25, 4.0]),
        "boolean": st.booleans(),
        "string": st.sampled_from(WORDS),
        "array": st.lists(st.sampled_from(WORDS), max_size=2),
        "null": st.none(),
    }
    return kinds.get(schema.get("type", ""), ANYTHING)


def changes_of_keys() -> st.SearchStrategy[tuple[str, str, Any]]:
    """(section, key, value): of the right kind, five times out of six."""
    schema = Config.model_json_schema()
    keys = [
        (section, key, wanted)
        for section, name in SECTIONS.items()
        for key, wanted in schema["$defs"][name]["properties"].items()
    ]
    return st.sampled_from(keys).flatmap(
        lambda one: st.tuples(
            st.just(one[0]), st.just(one[1]), st.one_of([of_kind(one[2])] * 5 + [ANYTHING])
        )
    )


SECTIONS = {
    "model": "ModelConfig",
    "data": "DataConfig",
    "run": "RunConfig",
    "cluster": "ClusterConfig",
    "sft": "SFTConfig",
    "reward": "RewardConfig",
    "train": "PolicyConfig",
    "evaluate": "EvaluateConfig",
    "tune": "TuneConfig",
}
SPOILS = [*[""] * 20, "\t", "train: {}\n", ": [", "- x\n", "&a *a", "x: !!python/x\n"]


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    changes=st.lists(changes_of_keys(), min_size=1, max_size=3),
    spoil=st.sampled_from(SPOILS),
    place=st.integers(0, 40),
)
def test_any_config_exits_with_0_or_2(
    changes: list[tuple[str, str, Any]],
    spoil: str,
    place: int,
    raw_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Odd values of any keys, or a spoiled file: a plan or one message, never a traceback."""
    monkeypatch.chdir(tmp_path)
    raw = copy.deepcopy(raw_config)
    for section, key, value in changes:
        raw.setdefault(section, {})[key] = value
    lines = yaml.safe_dump(raw, allow_unicode=True).splitlines(keepends=True)
    lines.insert(min(place, len(lines)), spoil)
    file = tmp_path / "config.yaml"
    file.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")

    done = runner.invoke(app, ["run", "--config", str(file), "--dry-run"])
    assert done.exit_code in (0, 2), (changes, done.output, done.exception)
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert "Traceback" not in done.output
    assert done.exit_code == 0 or done.output.startswith("error: ")


def test_gguf_needs_its_package(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    raw_config["model"]["model_name_or_path"] = str(tmp_path / "model.gguf")
    find = importlib.util.find_spec

    def find_all_but_gguf(name: str, *more: Any) -> Any:
        return None if name == "gguf" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_gguf)
    done = call(raw_config, tmp_path)
    assert done.exit_code == 2
    assert "needs the package gguf: pip install" in done.output


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("sft", "pairs"),
        ("reward", "pairs"),
        ("margins", "pairs"),
        ("train", "sft"),
        ("evaluate", "sft"),
        ("tune", "sft"),
    ],
)
def test_stage_names_the_one_to_run_first(
    command: str, first: str, raw_config: dict[str, Any], tmp_path: Path
) -> None:
    done = call(raw_config, tmp_path, command)
    assert done.exit_code == 2, done.output
    assert f"run `madpo-ray run --until {first}` first" in done.output


def test_sft_without_its_section(raw_config: dict[str, Any], tmp_path: Path) -> None:
    del raw_config["sft"]
    done = call(raw_config, tmp_path, "sft")
    assert done.exit_code == 2, done.output
    assert "the config has no section sft" in done.output


def test_no_usable_pair(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}]
    file = write_jsonl(tmp_path / "same.jsonl", rows)
    raw_config["data"] |= {"files": [str(file)], "keep_columns": []}
    raw_config["evaluate"] = {}
    raw_config["cluster"]["num_workers"] = 1
    done = call(raw_config, tmp_path, "pairs")
    assert done.exit_code == 2, done.output
    assert "no usable pair" in done.output
    assert not (tmp_path / "tiny" / "pairs").exists()


@pytest.mark.parametrize(
    ("source", "address", "hint"),
    [
        ("cluster.address", "127.0.0.1:1", "give the head's host:6379"),
        ("RAY_ADDRESS", "http://127.0.0.1:1", "that is its dashboard, for `ray job submit`"),
    ],
)
def test_no_cluster_answers(
    source: str, address: str, hint: str, raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """The key or the variable that the address is from is named."""
    if source == "cluster.address":
        raw_config["cluster"]["address"] = address
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    # In a process of its own: this one may be connected to the tests' Ray.
    program = Path(sys.executable).with_name("madpo-ray")
    command = [program, "pairs", "--config", file]
    environ = os.environ | ({source: address} if source == "RAY_ADDRESS" else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 2, done.stderr
    assert f"{source}: no Ray cluster answers at {address}" in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_installed_command() -> None:
    program = Path(sys.executable).with_name("madpo-ray")
    command = [program, "run", "--config", "/none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config file /none.yaml does not exist\n"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("wrong"), 2, "error: wrong\n"),
        (Stopped("broken", ExitCode.FAILED), 1, "error: broken\n"),
        (Stopped("saved", ExitCode.TERMINATED), 143, "saved\n"),
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes\n"),
    ],
)
def test_ends_with_one_message_and_a_code(
    raised: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, exit_codes():
        raise raised
    assert caught.value.code == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("until", "stages"),
    [
        ("pairs", "pairs"),
        ("margins", "pairs, sft, reward, margins"),
        ("export", "pairs, sft, reward, margins, export"),
        ("train", "pairs, sft, reward, margins, train"),
    ],
)
@pytest.mark.parametrize("mode", ["stored", "stream"])
def test_run_until_a_stage(
    until: str, stages: str, mode: str, raw_config: dict[str, Any], tmp_path: Path
) -> None:
    override = f"margins.mode={mode}"
    done = call(raw_config, tmp_path, "run", "--until", until, "--dry-run", "--set", override)
    assert done.exit_code == 0, done.output
    if mode == "stream" and until == "train":  # which scores the pairs by itself
        stages = "pairs, sft, reward, train"
    assert f"stages to do: {stages}\n" in done.output
