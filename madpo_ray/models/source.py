"""Find a model: hub name, folder or GGUF file; fetch and fingerprint it."""

import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray.artifacts.building import building, recover
from madpo_ray.artifacts.hashes import MANIFEST, hash_file
from madpo_ray.artifacts.manifest import Inputs, is_finished
from madpo_ray.config import ModelConfig, RunConfig
from madpo_ray.errors import UserError
from madpo_ray.models.conversion import WEIGHT_FILES, convert, read_template

if TYPE_CHECKING:
    from madpo_ray.models.loading import TaskType

# torch and transformers take seconds to import, and a dry run does not need them: they are imported
# inside functions.

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# What else is read of a folder that is not the hub's.
LOCAL_FILES = ("vocab.*", "*.tiktoken", "*.spm", "*.codes", "additional_chat_templates/*.jinja")
# The keys that name a model.
KEYS: Mapping["TaskType", str] = {
    "CAUSAL_LM": "model.model_name_or_path",
    "SEQ_CLS": "reward.source",
}
COMMIT = re.compile("[0-9a-f]{40}")
# One of these is in every folder that holds a tokenizer.
TOKENIZER_MARKS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenizer_config.json")


def check_model(
    model: ModelConfig, task_type: "TaskType" = "CAUSAL_LM", key: str | None = None
) -> None:
    """Raises UserError if the model, or a file or package that it needs, is missing.

    Loads nothing.

    Args:
        key: of the config, which names the model; None: the usual one of its kind.
    """
    where = key or KEYS[task_type]
    path = Path(model.model_name_or_path)
    template = model.chat_template_path
    if template is not None:
        read_template(Path(template))

    # The weights.
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{where}: {path} does not exist")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"{where}: {path} is not a GGUF file")
        _check_package("gguf", f"{path.name} needs the package gguf: pip install gguf")
    elif path.is_absolute():
        _check_folder(path, task_type, where)
    check_code(model)

    # Packages for what the config asks for.
    if model.load_in_4bit:
        message = "model.load_in_4bit needs the package bitsandbytes: pip install bitsandbytes"
        _check_package("bitsandbytes", message)
    if model.use_liger_kernel:
        message = "model.use_liger_kernel needs the package liger-kernel: pip install liger-kernel"
        _check_package("liger_kernel", message)
    if model.attn_implementation == "flash_attention_2":
        message = (
            "model.attn_implementation: flash_attention_2 needs the package flash-attn; "
            "sdpa needs none"
        )
        _check_package("flash_attn", message)


def check_code(model: ModelConfig) -> None:
    """Raises UserError if the code that the model brings, and that is run, could change."""
    path = Path(model.model_name_or_path)
    if path.suffix == ".gguf":
        _check_code(path.parent, model)
    elif path.is_absolute():
        _check_code(path, model)
    elif model.trust_remote_code and not COMMIT.fullmatch(model.model_revision):
        raise UserError(
            f"model.model_revision: {model.model_revision} can change, and model.trust_remote_code "
            "runs what it brings: give the 40 digits of a commit that you have read"
        )


def _check_folder(path: Path, task_type: "TaskType", key: str) -> None:
    """Raises UserError if a folder is not a model of the kind, with its tokenizer."""
    where = f"{key}: {path}"
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{where} is a LoRA adapter of {base}: merge it into its base (peft's "
            "merge_and_unload) and give the merged folder, or give the base"
        )

    # A complete model.
    if not (path / "config.json").is_file():
        raise UserError(f"{where} is not a folder with a config.json")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{where} has no safetensors weights, and no others are read: load it in transformers "
            "and save it, with its tokenizer, by save_pretrained into a folder to give here"
        )

    # Of the right kind, with its tokenizer.
    names = read_json(path / "config.json").get("architectures") or []
    classifiers = [name for name in names if "Classification" in str(name)]
    if task_type == "SEQ_CLS" and not classifiers:
        raise UserError(
            f"{where} is not a sequence classifier, but a {', '.join(names) or 'model'}"
        )
    if task_type == "CAUSAL_LM" and classifiers:
        raise UserError(
            f"{where} is a {classifiers[0]}, which has no language-modelling head: give the causal "
            "language model that the policy starts from"
        )
    if not any(next(path.glob(pattern), None) for pattern in TOKENIZER_MARKS):
        raise UserError(f"{where} has no tokenizer: save it into the same folder")


def _check_code(path: Path, model: ModelConfig) -> None:
    """Raises UserError if the model's code is of another repository, which nothing pins."""
    if not model.trust_remote_code:
        return
    for file in path.glob("*config.json"):  # the model's, and the tokenizer's
        if "--" in json.dumps(read_json(file).get("auto_map") or {}):
            raise UserError(
                f"model.trust_remote_code: {path} runs code of another repository (auto_map in "
                f"{file.name}), which has no fixed revision: copy that code into the model's folder"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file. Raises UserError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _check_package(name: str, message: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(message)


@functools.cache
def fetch_model(
    model: ModelConfig, task_type: "TaskType" = "CAUSAL_LM", key: str | None = None
) -> Path:
    """The local folder, or .gguf file, of a model.

    A hub name is downloaded (safetensors only) into the hub's cache, once per process, so that all
    stages of a run use the same revision.
    """
    check_model(model, task_type, key)
    where = key or KEYS[task_type]
    path = Path(model.model_name_or_path)
    if path.is_absolute():
        return path

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    # Everything but weights in other formats and, unless it is trusted, code.
    patterns = [*WEIGHT_FILES, *TOKENIZER_FILES]
    if model.trust_remote_code:
        patterns.append("*.py")
    try:
        folder = snapshot_download(
            model.model_name_or_path, revision=model.model_revision, allow_patterns=patterns
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{where}: {model.model_name_or_path} is neither a local path nor "
            f"reachable on the hub ({type(error).__name__}); check the name, the network, and "
            "HF_TOKEN for gated models"
        ) from None
    # What a hub name leads to is known only now.
    _check_folder(Path(folder), task_type, where)
    _check_code(Path(folder), model)
    return Path(folder)


def model_inputs(
    model: ModelConfig, task_type: "TaskType" = "CAUSAL_LM", key: str | None = None
) -> Inputs:
    """What identifies a model: the content of its files and of the chat template."""
    source = fetch_model(model, task_type, key)
    if source.is_file():
        hashes = {source.name: hash_file(source)}
    else:
        files = _files_of(source, model)
        hashes = {str(file.relative_to(source)): hash_file(file) for file in files}
    template = model.chat_template_path
    template_hash = hash_file(Path(template)) if template else None
    return Inputs("model", content={"files": hashes, "chat_template": template_hash})


def _files_of(folder: Path, model: ModelConfig) -> list[Path]:
    """The files that are read: others may come and go, as in the hub's cache."""
    patterns = [*WEIGHT_FILES, *TOKENIZER_FILES]
    if Path(model.model_name_or_path).is_absolute():
        patterns += LOCAL_FILES
    if model.trust_remote_code:
        patterns.append("**/*.py")
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(found - {folder / MANIFEST})


def find_base_model(model: ModelConfig, run: RunConfig) -> Path | None:
    """A folder with the base model's config.json. Converts nothing: None if that is to be done."""
    source = fetch_model(model)
    if source.is_dir():
        return source
    folder = run.folder / "model"
    return folder if is_finished(folder, model_inputs(model)) else None


def base_model(model: ModelConfig, run: RunConfig) -> Path:
    """The folder that every worker loads the base model from.

    A GGUF file is converted once, and a chat template put in place once, in the run's folder.
    """
    source = fetch_model(model)
    if source.is_dir() and model.chat_template_path is None:
        return source
    folder = run.folder / "model"
    inputs = model_inputs(model)
    recover(folder, inputs)
    if not is_finished(folder, inputs):
        with building(folder, inputs) as (partial, _):
            convert(source, model, partial)
    return folder
