"""Models: find one (hub name, folder, GGUF), load it as policy or reward model, add LoRA, save it as a transformers
folder."""

import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from madpo_ray.artifacts import Inputs, building, hash_file, hash_files, is_finished, write_json
from madpo_ray.config import Config, ModelConfig, TrainingConfig, UserError, nearest

logger = logging.getLogger(__name__)

# Equal, by test, to two unpadded forwards under a 4-D mask with restarted positions. Others: two rows a pair.
SHARED_PREFIX_MODEL_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma", "gemma2", "gemma3_text"}
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def check_model(model: ModelConfig) -> None:
    """Raises UserError where the model, or a package or file that it needs, is not there. Loads nothing."""
    path = Path(model.model_name_or_path)
    if model.chat_template_path is not None and not Path(model.chat_template_path).is_file():
        raise UserError(f"model.chat_template_path: {model.chat_template_path} does not exist")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.model_name_or_path: {path} does not exist")
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{path.name} needs the package gguf: pip install 'madpo-ray[gguf]'")
    elif path.is_absolute():
        if not (path / "config.json").is_file():
            raise UserError(f"model.model_name_or_path: {path} is no folder with a config.json")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"model.model_name_or_path: {path} has no safetensors weights, and no others are read")
    if model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_4bit needs the package bitsandbytes: pip install bitsandbytes")
    if model.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("model.attn_implementation: flash_attention_2 needs the package flash-attn; sdpa needs none")


@functools.cache
def source_folder(model: ModelConfig) -> Path:
    """The local folder, or .gguf file, of a model; a hub name is fetched (safetensors only) into the hub's cache, once
    per process, so that all stages of a run take the same revision.
    """
    check_model(model)
    path = Path(model.model_name_or_path)
    if path.is_absolute():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*WEIGHT_FILES, *TOKENIZER_FILES, *(["*.py"] if model.trust_remote_code else [])]
    try:
        folder = snapshot_download(model.model_name_or_path, revision=model.model_revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.model_name_or_path: {model.model_name_or_path} is neither a local path nor reachable on the hub "
            f"({type(error).__name__}); check the name, the network, and HF_TOKEN for gated models"
        ) from None
    return Path(folder)


def model_inputs(config: Config) -> Inputs:
    """What identifies the base model: its files' content and the chat template, wherever they lie."""
    source = source_folder(config.model)
    template = config.model.chat_template_path
    hashes = {source.name: hash_file(source)} if source.is_file() else hash_files(source)
    content = {"files": hashes, "chat_template": hash_file(Path(template)) if template else None}
    return Inputs("model", settings={}, content=content)


def base_folder(config: Config) -> Path:
    """The folder that every worker loads the base model from: a GGUF file is converted once, a template put in
    place."""
    source = source_folder(config.model)
    if source.is_dir() and config.model.chat_template_path is None:
        return source
    folder, inputs = config.run.folder / "model", model_inputs(config)
    if not is_finished(folder, inputs):
        with building(folder, inputs) as (partial, _):
            _convert(source, config.model, partial)
    return folder


def _convert(source: Path, model: ModelConfig, folder: Path) -> None:
    from transformers import AutoTokenizer

    gguf = {"gguf_file": source.name} if source.is_file() else {}
    parent = source.parent if source.is_file() else source
    tokenizer = AutoTokenizer.from_pretrained(parent, trust_remote_code=model.trust_remote_code, **gguf)
    if model.chat_template_path is not None:
        tokenizer.chat_template = Path(model.chat_template_path).read_text()
    if gguf:
        logger.info("converting %s to float weights", source.name)
        weights = _load("AutoModelForCausalLM", parent, model, dtype=torch.float32, **gguf)
        # The weights are plain floats now; transformers refuses to save what still calls itself quantized.
        del weights.config.quantization_config
        weights.hf_quantizer = None
        weights.save_pretrained(folder)
    else:
        # Links to the weights alone: what the tokenizer saves below must not be written through one.
        for pattern in (*WEIGHT_FILES, "config.json", "generation_config.json", "*.py"):
            for file in source.glob(pattern):
                (folder / file.name).symlink_to(file)
    tokenizer.save_pretrained(folder)


def _load(auto_class: str, folder: Path, model: ModelConfig, **options: Any) -> Any:
    import transformers

    return getattr(transformers, auto_class).from_pretrained(
        folder,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        **({} if "gguf_file" in options else {"use_safetensors": True}),
        **options,
    )


def load_tokenizer(folder: Path, model: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)


def load_policy(folder: Path, model: ModelConfig) -> nn.Module:
    """A causal language model in the config's dtype; `folder` may hold a LoRA adapter with its base's path inside."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        base = load_policy(Path(str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)), model)
        adapted: nn.Module = PeftModel.from_pretrained(base, str(folder))
        return adapted
    options = {"dtype": DTYPES[model.dtype], **(_four_bits(model) if model.load_in_4bit else {})}
    loaded: nn.Module = _load("AutoModelForCausalLM", folder, model, **options)
    return loaded


def load_exact(folder: Path, model: ModelConfig) -> nn.Module:
    """A causal language model in float32, to merge LoRA into: bfloat16 would round its small changes off."""
    return load_policy(folder, model.model_copy(update={"dtype": "float32"}))


def _four_bits(model: ModelConfig) -> dict[str, Any]:
    """QLoRA's settings (Dettmers et al. 2023), on this process's GPU."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
    )
    return {"quantization_config": quantization, "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))}}


def load_reward_model(folder: Path, model: ModelConfig) -> nn.Module:
    """A sequence classifier with one label; a folder without its head gets a new one of zeros."""
    from transformers import AutoConfig

    saved = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    trained = any("SequenceClassification" in name for name in saved.architectures or [])
    # A trained one keeps its own dtype: merged from LoRA it is float32, since bfloat16 would round small changes off.
    options: dict[str, Any] = {"dtype": "auto" if trained else DTYPES[model.dtype], "num_labels": 1}
    loaded: nn.Module = _load("AutoModelForSequenceClassification", folder, model, **options)
    if not trained:
        # All rewards 0 at the start: the first loss is ln 2, and no random direction has to be unlearned.
        weight: Any = loaded.score.weight  # type: ignore[union-attr]
        nn.init.zeros_(getattr(weight, "ds_tensor", weight))  # this rank's shard of it, under ZeRO-3
    return loaded


def prepare_for_training(model: nn.Module, settings: TrainingConfig, *, task_type: str) -> nn.Module:
    """LoRA, dropout and activation checkpointing as the settings say. `task_type` is peft's: CAUSAL_LM or SEQ_CLS."""
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if settings.use_peft:
            model.enable_input_require_grads()  # type: ignore[operator]
    if settings.use_peft:
        from peft import LoraConfig, get_peft_model

        targets = settings.lora_target_modules
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
            layers_to_transform=list(settings.lora_layers_to_transform) or None,
            modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
            task_type=task_type,
        )
        model = get_peft_model(model, lora)
    if settings.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        _zero_config_dropout(model)
    return model


def _zero_config_dropout(model: nn.Module) -> None:
    """Attention dropout is a number that layers read at each forward, not a module."""
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_trainable(folder: Path, model: ModelConfig, settings: TrainingConfig, *, task_type: str) -> None:
    """Looks at a model's architecture, without its weights. Raises UserError where it has no reward head to train, or
    LoRA's settings name what it does not have. `task_type` is peft's: CAUSAL_LM or SEQ_CLS.
    """
    import transformers

    classes = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    # Whether FlashAttention runs is the workers' affair: here may be no GPU.
    attention = None if model.attn_implementation == "flash_attention_2" else model.attn_implementation
    try:
        with torch.device("meta"):
            skeleton = getattr(transformers, classes[task_type]).from_config(
                config, trust_remote_code=model.trust_remote_code, attn_implementation=attention
            )
    except ValueError as error:
        raise UserError(
            f"model: no {classes[task_type]} of {config.model_type} with {model.attn_implementation}: {error}"
        ) from None
    if task_type == "SEQ_CLS" and not hasattr(skeleton, "score"):
        raise UserError(f"model.model_name_or_path: the {type(skeleton).__name__} has no linear head named score")
    if not settings.use_peft:
        return
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in skeleton.named_modules() if name})
    for target in settings.lora_target_modules:
        if target != "all-linear" and target.rsplit(".", 1)[-1] not in names:
            raise UserError(
                f"lora_target_modules: {config.model_type} has no module {target!r}{nearest(target, names)}"
            )
    layers = int(config.get_text_config().num_hidden_layers)
    if beyond := [layer for layer in settings.lora_layers_to_transform if not 0 <= layer < layers]:
        raise UserError(f"lora_layers_to_transform: {beyond} of a model with layers 0 to {layers - 1}")


def base_of(model: nn.Module) -> Any:
    """The transformers model, below a LoRA wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def can_share_prefix(config: Any, attn_implementation: str) -> bool:
    """Whether one row [prompt | chosen | rejected] gives a model's numbers: attention, full or windowed, over known
    positions, through masks that are ours to make. `config` is transformers'.
    """
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config.model_type in SHARED_PREFIX_MODEL_TYPES
        and attn_implementation in ("sdpa", "eager", "flex_attention")
        and layer_types <= {"full_attention", "sliding_attention"}
    )


def shares_prefix(model: nn.Module, settings: ModelConfig) -> bool:
    """`can_share_prefix` of a loaded model, unless the config turns it off."""
    return settings.shared_prefix == "auto" and can_share_prefix(base_of(model).config, settings.attn_implementation)


@functools.cache
def takes_shared_rows(folder: Path, settings: ModelConfig) -> bool:
    """The same of a model's folder, without loading it. Says once in a process where a model does not."""
    if settings.shared_prefix == "off":
        return False
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    shares = can_share_prefix(config, settings.attn_implementation)
    if not shares:
        logger.warning(
            "%s with %s attention does not take shared-prefix rows; each pair is read as two rows: slower, "
            "same numbers",
            config.model_type,
            settings.attn_implementation,
        )
    return shares


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once (tied ones share it), and every buffer that belongs in a file."""
    persistent = model.state_dict(keep_vars=True).keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def merge_adapter(model: Any, adapter: dict[str, torch.Tensor], fresh: nn.Module) -> nn.Module:
    """`fresh`, a whole base model, with the trained LoRA part of `model` merged into its weights."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=adapter)
        merged: nn.Module = PeftModel.from_pretrained(fresh, folder).merge_and_unload()
    return merged


# Where transformers, too, begins another file.
SHARD_BYTES = 5 * 10**9


def _is_saved_otherwise(model: Any) -> bool:
    """Whether transformers renames, merges or splits the model's tensors in its files. Asked with empty ones: under
    ZeRO-3 it notes every conversion that there might have been."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in saved_tensors(model)}
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    saved = revert_weight_conversion(model, dict(empty))
    return saved.keys() != empty.keys() or any(saved[name] is not tensor for name, tensor in empty.items())


def save_whole(
    model: Any, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, is_writer: bool = True
) -> None:
    """Weights and config as transformers loads them, with one file's worth of `tensors` in memory at a time.

    Every rank runs through `tensors`, which may gather them; only the writer writes.
    """
    # Its files have other names or other tensors than it has, or code has to be saved beside them.
    if _is_saved_otherwise(model) or model.is_remote_code():
        whole = {name: tensor for name, tensor in tensors if is_writer}
        if is_writer:
            model.save_pretrained(str(folder), state_dict=whole)
        return
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors:
        if not is_writer:
            continue
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if not is_writer:
        return
    flush()
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        places = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    for i, name in enumerate(names):
        (folder / f"part-{i}").rename(folder / name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
