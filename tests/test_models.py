"""Finding, converting and loading models; nothing of the user's is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, make_model, tiny_config

from madpo_ray import models
from madpo_ray.artifacts import hash_files
from madpo_ray.config import ModelConfig, PolicyConfig, RewardConfig, UserError
from madpo_ray.config_file import parse_config
from madpo_ray.models import (
    _is_saved_otherwise,
    base_folder,
    check_model,
    check_trainable,
    load_policy,
    load_tokenizer,
    save_whole,
    saved_tensors,
)


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


def test_weights_in_several_files_load_as_one_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "SHARD_BYTES", 40_000)
    settings = ModelConfig(model_name_or_path=str(model_folder))
    model = load_policy(model_folder, settings)
    save_whole(model, saved_tensors(model), tmp_path)
    assert len(list(tmp_path.glob("model-0000*-of-0000*.safetensors"))) > 2
    again = load_policy(tmp_path, settings)
    for (name, one), (other_name, other) in zip(saved_tensors(model), saved_tensors(again), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    assert again.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target_modules": ["q_prj"]}, "llama has no module 'q_prj'; did you mean 'q_proj'?"),
        (
            {"lora_target_modules": ["q_proj"], "lora_layers_to_transform": [1, 2]},
            "lora_layers_to_transform: [2] of a model with layers 0 to 1",
        ),
    ],
)
def test_lora_on_what_is_not_there_is_refused(changes: dict[str, Any], message: str, model_folder: Path) -> None:
    settings, model = PolicyConfig(use_peft=True, **changes), ModelConfig(model_name_or_path=str(model_folder))
    with pytest.raises(UserError, match=re.escape(message)):
        check_trainable(model_folder, model, settings, task_type="CAUSAL_LM")


def test_a_model_without_a_reward_head_is_refused(tmp_path: Path) -> None:
    tiny_config("cohere").save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path))
    check_trainable(tmp_path, model, PolicyConfig(), task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="no AutoModelForSequenceClassification of cohere"):
        check_trainable(tmp_path, model, RewardConfig(), task_type="SEQ_CLS")


def test_attention_that_a_model_does_not_have_is_refused(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path), attn_implementation="flex_attention")
    with pytest.raises(UserError, match="no AutoModelForCausalLM of gpt2 with flex_attention"):
        check_trainable(tmp_path, model, PolicyConfig(), task_type="CAUSAL_LM")


@pytest.mark.parametrize(("model_type", "expected"), [("llama", False), ("mixtral", True)])
def test_a_model_whose_files_hold_other_tensors_is_known(model_type: str, expected: bool) -> None:
    # Mixtral's files have a tensor for each expert, and the model one for all.
    assert _is_saved_otherwise(make_model(model_type)) is expected
