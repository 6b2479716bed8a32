"""Finding and converting models; nothing of the user's is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from madpo_ray.artifacts.hashes import describe_files
from madpo_ray.config import ModelConfig, parse_config
from madpo_ray.errors import UserError
from madpo_ray.models.loading import load_policy, load_tokenizer
from madpo_ray.models.source import (
    base_model,
    check_model,
    model_inputs,
)
from support.models import TEMPLATE, edited


def test_chat_template_keeps_the_models_own_folder(
    raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """The weights are links, the tokenizer is a copy with the template."""
    (tmp_path / "t.jinja").write_text(TEMPLATE + "!")
    raw_config["model"]["chat_template_path"] = str(tmp_path / "t.jinja")
    config = parse_config(raw_config)
    before = describe_files(model_folder)
    folder = base_model(config.model, config.run)
    assert folder == config.run.folder / "model"
    assert describe_files(model_folder) == before
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
    (tmp_path / "copy" / "gone.json").symlink_to(tmp_path / "gone.json")
    for name in ("README.md", "5/model.safetensors", ".cache/a.json", "a.py", "manifest.json"):
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_text("not read")
    assert model_inputs(copy).fingerprint == one.fingerprint
    with_code = copy.model_copy(update={"trust_remote_code": True})
    assert model_inputs(with_code).fingerprint != one.fingerprint
    for name in ("vocab.bpe", "a.tiktoken", "additional_chat_templates/b.jinja", "config.json"):
        before = model_inputs(copy).fingerprint
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_text("{}")
        assert model_inputs(copy).fingerprint != before


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors weights"):
        check_model(ModelConfig(model_name_or_path=str(tmp_path)))


def test_adapter_is_refused_with_its_base(tmp_path: Path) -> None:
    adapter = {"base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="is a LoRA adapter of org/base: merge it"):
        check_model(ModelConfig(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("name", ["SequenceClassification", "TokenClassification"])
def test_classifier_is_no_policy(name: str, model_folder: Path, tmp_path: Path) -> None:
    model = edited(model_folder, tmp_path / "m", architectures=[f"LlamaFor{name}"])
    with pytest.raises(UserError, match=f"is a LlamaFor{name}, which has no language-modelling"):
        check_model(model)


def test_folder_needs_a_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    model = edited(model_folder, tmp_path / "m")
    for file in (tmp_path / "m").glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        check_model(model)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_config_is_named(content: str, model_folder: Path, tmp_path: Path) -> None:
    model = edited(model_folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        check_model(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for", "template.jinja, line 1: "),
        (b"a\n{{ messages[ }}", "template.jinja, line 2: "),
        ("\u00e4".encode("latin-1"), "template.jinja cannot be read"),
    ],
)
def test_broken_chat_template_is_named(
    content: bytes, message: str, raw_config: dict[str, Any], tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_bytes(content)
    raw_config["model"]["chat_template_path"] = str(template)
    config = parse_config(raw_config)
    with pytest.raises(UserError, match=message):
        base_model(config.model, config.run)


def test_template_may_refuse_the_example(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Only its syntax is checked: it may want a system message."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('system first') }}")
    raw_config["model"]["chat_template_path"] = str(template)
    config = parse_config(raw_config)
    assert (base_model(config.model, config.run) / "chat_template.jinja").exists()


def test_what_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF file"):
        check_model(ModelConfig(model_name_or_path=str(tmp_path / "model.gguf")))


def test_gguf_brings_no_code_of_others(tmp_path: Path) -> None:
    """Of the tokenizer next to it."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "a/b--t.T"}}')
    model = ModelConfig(model_name_or_path=str(tmp_path / "model.gguf"), trust_remote_code=True)
    with pytest.raises(UserError, match="runs code of another repository"):
        check_model(model)


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        ("load_in_4bit", True, "bitsandbytes"),
        ("use_liger_kernel", True, "liger-kernel"),
        ("attn_implementation", "flash_attention_2", "flash-attn"),
    ],
)
def test_missing_package_is_named(key: str, value: Any, package: str, model_folder: Path) -> None:
    """Packages for GPUs, which the tests do not install."""
    model = ModelConfig(model_name_or_path=str(model_folder), **{key: value})
    with pytest.raises(UserError, match=f"model.{key}.* needs the package {package}"):
        check_model(model)
