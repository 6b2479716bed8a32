"""The command, as a user sees it."""

from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from madpo_ray.cli import app
from support.models import make_model


def call(tmp_path: Path, *arguments: str) -> Any:
    make_model("llama").config.save_pretrained(tmp_path / "model")
    raw = {
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"files": [str(tmp_path / "none.jsonl")], "max_length": 32},
        "cluster": {"use_gpu": True},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    return CliRunner().invoke(app, ["plan", "--config", str(file), *arguments])


def test_prints_what_fits(tmp_path: Path) -> None:
    done = call(tmp_path, "--gpus-per-node", "8", "--nodes", "2", "--prompt-tokens", "20")
    assert done.exit_code == 0, done.output
    assert "every pair has a prompt of 20 tokens and responses of 12" in done.output
    assert "GPUs: 2 x 8 H100-80G, planned with 72.8 GiB of each" in done.output
    assert "train: first settings that fit: zero_stage: 0\n" in done.output
    assert "train: GPUs are idle for 75% of that" in done.output
    assert "at 40% of the GPUs' peak" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model"]


def test_gpus_are_those_of_the_config_by_default(tmp_path: Path) -> None:
    assert "GPUs: 1 x 1 H100-80G" in call(tmp_path).output
    assert "GPUs: 2 x 8 H100-80G" in call(tmp_path, "--set", "cluster.num_workers=12").output


def test_unknown_gpu(tmp_path: Path) -> None:
    done = call(tmp_path, "--gpu", "A100")
    assert done.exit_code == 2
    assert "did you mean 'A100" in done.output
