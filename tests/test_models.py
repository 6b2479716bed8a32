"""Finding, converting and loading models; nothing of the user's is written."""

from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE

from madpo_ray.artifacts import hash_files
from madpo_ray.config import ModelConfig, UserError
from madpo_ray.config_file import parse_config
from madpo_ray.models import base_folder, check_model, load_policy, load_tokenizer


def test_a_chat_template_leaves_the_models_own_folder_alone(
    raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE + "!")
    raw_config["model"]["chat_template_path"] = str(tmp_path / "t.jinja")
    config, before = parse_config(raw_config), hash_files(model_folder)
    folder = base_folder(config)
    assert folder == config.run.folder / "model"
    assert hash_files(model_folder) == before
    assert load_tokenizer(folder, config.model).chat_template == TEMPLATE + "!"
    assert load_policy(folder, config.model).config.model_type == "llama"
    assert base_folder(config) == folder


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors weights"):
        check_model(ModelConfig(model_name_or_path=str(tmp_path)))
