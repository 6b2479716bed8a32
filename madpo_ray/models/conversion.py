"""A model's folder in a run: a GGUF file's float weights, or a model with another template."""

import logging
from pathlib import Path
from typing import Any

from madpo_ray.config import ModelConfig
from madpo_ray.errors import UserError

# torch and transformers take seconds to import, and a dry run does not need them: they are imported
# inside functions.

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def read_template(path: Path) -> str:
    """Raises UserError if the chat template is missing or not a text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"model.chat_template_path: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template_path: {path} cannot be read: {error}") from None


def convert(source: Path, model: ModelConfig, folder: Path) -> None:
    """Fills a folder that transformers loads, from a GGUF file or a folder, with the template."""
    from transformers import AutoTokenizer

    is_gguf = source.is_file()
    parent = source.parent if is_gguf else source
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if is_gguf:
        options["gguf_file"] = source.name

    tokenizer = AutoTokenizer.from_pretrained(parent, **options)
    if model.chat_template_path is not None:
        tokenizer.chat_template = read_template(Path(model.chat_template_path))
        _check_template(tokenizer, model.chat_template_path)

    if is_gguf:
        logger.info("converting %s to float weights", source.name)
        _convert_gguf(parent, options, folder)
    else:
        _link_weights(source, folder)
    tokenizer.save_pretrained(folder)


def _check_template(tokenizer: Any, path: str) -> None:
    """Raises UserError if the chat template is not Jinja."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(f"model.chat_template_path: {path}, line {error.lineno}: {error}") from None
    except Exception:  # only the syntax is checked; the template may refuse this example
        return


def _convert_gguf(parent: Path, options: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    weights: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, **options)
    # transformers refuses to save a model that is marked as quantized; these are plain floats now.
    del weights.config.quantization_config
    weights.hf_quantizer = None
    weights.save_pretrained(folder)


def _link_weights(source: Path, folder: Path) -> None:
    """Links to everything but the tokenizer, which is saved again and must not follow a link."""
    for pattern in (*WEIGHT_FILES, "config.json", "generation_config.json", "*.py"):
        for file in source.glob(pattern):
            (folder / file.name).symlink_to(file)
