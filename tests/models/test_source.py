"""Finding and converting models; nothing of the user's is written."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from madpo_ray.artifacts.manifest import hash_files
from madpo_ray.config import ModelConfig, parse_config
from madpo_ray.errors import UserError
from madpo_ray.models.loading import load_policy, load_tokenizer
from madpo_ray.models.source import base_model, check_model, model_inputs
from support.models import TEMPLATE


def test_chat_template_keeps_the_models_own_folder(
    raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """The weights are links, the tokenizer is a copy with the template."""
    (tmp_path / "t.jinja").write_text(TEMPLATE + "!")
    raw_config["model"]["chat_template_path"] = str(tmp_path / "t.jinja")
    config = parse_config(raw_config)
    before = hash_files(model_folder)
    folder = base_model(config.model, config.run)
    assert folder == config.run.folder / "model"
    assert hash_files(model_folder) == before
    assert load_tokenizer(folder, config.model).chat_template == TEMPLATE + "!"
    policy: Any = load_policy(folder, config.model)
    assert policy.config.model_type == "llama"

    manifest = (folder / "manifest.json").stat().st_mtime_ns
    assert base_model(config.model, config.run) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == manifest  # converted once


def test_folder_without_template_is_used_as_it_is(config: Any, model_folder: Path) -> None:
    assert base_model(config.model, config.run) == model_folder


def test_inputs_follow_the_files(model_folder: Path, tmp_path: Path) -> None:
    """And the template, but not the path."""
    shutil.copytree(model_folder, tmp_path / "copy")
    one = model_inputs(ModelConfig(model_name_or_path=str(model_folder)))
    copy = ModelConfig(model_name_or_path=str(tmp_path / "copy"))
    assert model_inputs(copy).fingerprint == one.fingerprint

    (tmp_path / "t.jinja").write_text("x")
    with_template = copy.model_copy(update={"chat_template_path": str(tmp_path / "t.jinja")})
    assert model_inputs(with_template).fingerprint != one.fingerprint
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert model_inputs(copy).fingerprint != one.fingerprint


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors weights"):
        check_model(ModelConfig(model_name_or_path=str(tmp_path)))
