"""The command: help, exit codes, and one message for each kind of bad input."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Edit, write_jsonl
from typer.testing import CliRunner

from madpo_ray.cli import app

runner = CliRunner()


def call(raw: dict[str, Any], tmp_path: Path, *arguments: str) -> Any:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    command, *more = arguments or ("run",)
    return runner.invoke(app, [command, "--config", str(file), *more])


def test_help_names_every_stage() -> None:
    shown = runner.invoke(app, ["--help"]).output
    for command in ("run", "pairs", "sft", "reward", "margins", "train", "evaluate", "tune"):
        assert command in shown
    assert "--dry-run" in runner.invoke(app, ["train", "--help"]).output


def test_dry_run_counts_and_writes_nothing_but_a_folder(raw_config: dict[str, Any], tmp_path: Path) -> None:
    done = call(raw_config, tmp_path, "run", "--dry-run", "--set", "train.max_steps=7")
    assert done.exit_code == 0, done.output
    assert "steps of train: 7" in done.output
    assert "idle" not in done.output
    assert "workers: 2, each 1 CPUs" in done.output
    assert ": 90}" in done.output
    assert "stages to do: pairs, sft, reward, margins, train, evaluate" in done.output
    assert list((tmp_path / "tiny").iterdir()) == []


def test_dry_run_of_one_command_tells_of_that_one(raw_config: dict[str, Any], tmp_path: Path) -> None:
    assert "stages to do: train\n" in call(raw_config, tmp_path, "train", "--dry-run").output
    assert "trials: 8, 1 at a time" in call(raw_config, tmp_path, "tune", "--dry-run").output


def test_dry_run_tells_of_workers_that_would_wait(raw_config: dict[str, Any], tmp_path: Path) -> None:
    done = call(raw_config, tmp_path, "run", "--dry-run", "--set", "train.per_device_train_batch_size=3")
    assert "idle in train: 1 of 4 micro-batches of a step are empty; a multiple of 6 pairs fills all" in done.output


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
    "folder not writable": (edit("run", "storage_path", "/proc/nothing"), "cannot write to the run's folder"),
    "no model": (edit("model", "model_name_or_path", "/no/model"), "no folder with a config.json"),
    "no GGUF file": (edit("model", "model_name_or_path", "/no/model.gguf"), "/no/model.gguf does not exist"),
    "no template": (edit("model", "chat_template_path", "/no.jinja"), "/no.jinja does not exist"),
    "too many workers": (edit("cluster", "num_workers", 4000), "can never be placed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_2_and_one_message(name: str, raw_config: dict[str, Any], tmp_path: Path) -> None:
    change, message = BAD[name]
    change(raw_config)
    done = call(raw_config, tmp_path)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "tiny" / "pairs").exists()


def test_a_gguf_file_without_its_package(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    raw_config["model"]["model_name_or_path"] = str(tmp_path / "model.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    done = call(raw_config, tmp_path)
    assert done.exit_code == 2
    assert "needs the package gguf: pip install" in done.output


@pytest.mark.parametrize("command", ["sft", "reward", "margins", "train", "evaluate", "tune"])
def test_a_stage_without_its_inputs_says_which_to_run(command: str, raw_config: dict[str, Any], tmp_path: Path) -> None:
    done = call(raw_config, tmp_path, command)
    assert done.exit_code == 2, done.output
    assert "first, or `madpo-ray run`" in done.output


def test_zero_usable_pairs(raw_config: dict[str, Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    raw_config["data"] |= {"files": [str(file)], "keep_columns": []}
    raw_config["evaluate"] = {}
    raw_config["cluster"]["num_workers"] = 1
    done = call(raw_config, tmp_path, "pairs")
    assert done.exit_code == 2, done.output
    assert "no usable pair" in done.output
    assert not (tmp_path / "tiny" / "pairs").exists()


def test_no_cluster_answers(raw_config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    command = [Path(sys.executable).with_name("madpo-ray"), "pairs", "--config", file]
    # In a process of its own: this one may be connected to the tests' Ray.
    done = subprocess.run(
        [*command, "--set", "cluster.address=127.0.0.1:1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("madpo-ray")
    done = subprocess.run([command, "run", "--config", "/none.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config file /none.yaml does not exist\n"
