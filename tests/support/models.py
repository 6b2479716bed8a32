"""Tiny random models and a tokenizer that knows the words of the tests' pairs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from madpo_ray.config import ModelConfig
from support.pairs import WORDS

TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 400

# Architectures that read packed rows, by transformers' names.
ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "cohere",
    "cohere2",
    "starcoder2",
    "opt",
    "smollm3",
    "glm",
    "glm4",
    "exaone4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "hunyuan_v1_dense",
    "ernie4_5",
    "seed_oss",
    "helium",
    "apertus",
    "arcee",
    "lfm2",
    "ministral",
    "biogpt",
    "persimmon",
]


def make_tokenizer() -> Any:
    """Byte-level BPE with 400 tokens, a pad, a beginning and an end token, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=TEMPLATE,
    )


def tiny_config(model_type: str, **changes: Any) -> Any:
    """transformers' config of a model with two layers of 32 channels."""
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return AutoConfig.for_model(model_type, **{**common, **sizes, **changes})


def make_model(
    model_type: str = "llama", seed: int = 0, attention: str = "", **changes: Any
) -> Any:
    """A causal language model with larger weights than usual, so that attention matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    # Gemma 2 has no SDPA in transformers.
    attention = attention or ("eager" if model_type == "gemma2" else "sdpa")
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, **changes), attn_implementation=attention
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15 if "embed" not in name else 0.5)
    return model.eval()


def make_reward_model(num_labels: int = 1) -> Any:
    """A sequence classifier with a random head."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        tiny_config("llama", num_labels=num_labels), attn_implementation="sdpa"
    ).eval()


def edited(model_folder: Path, target: Path, **config: Any) -> ModelConfig:
    """A copy of the model with other values in its config.json."""
    shutil.copytree(model_folder, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return ModelConfig(model_name_or_path=str(target))
