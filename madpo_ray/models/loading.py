"""Load a model as policy or reward model."""

import contextlib
import gc
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from madpo_ray.config import ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.models.devices import OVER_GPUS, is_spread, placement, require_on_gpus

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

# peft and transformers' model classes take seconds to import: they are imported inside functions.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

REWARD_HEAD = "score.weight"
# A language model's head, which a reward model does not use.
LM_HEADS = {"lm_head.weight", "lm_head.bias", "embed_out.weight"}

# In the config of reward models that are trained here: texts without a chat template end with the
# end of sequence, where the reward is read.
READS_END = "reads_end_of_sequence"

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]  # peft's names
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}


def load_tokenizer(folder: Path, model: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model's folder, with its chat template."""
    from transformers import AutoTokenizer

    trust = model.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    # The tokenizers library raises plain exceptions for a broken file.
    except Exception as error:
        raise UserError(f"the tokenizer of {folder} cannot be loaded: {error}") from None


def remote_code(model: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_config` that decide whose code is run, and which commit of it."""
    if not model.trust_remote_code:
        return {"trust_remote_code": False}
    return {"trust_remote_code": True, "code_revision": model.model_revision}


def load_policy(
    folder: Path,
    model: ModelConfig,
    *,
    base: Path | None = None,
    device: torch.device | None = None,
    over_gpus: bool = False,
) -> nn.Module:
    """A causal language model in the config's dtype.

    Args:
        device: where its weights go; None: the CPU.
        over_gpus: spread its layers over all GPUs of this process.
        base: folder of the model that the adapter in `folder`, if it holds one, was trained on. The
            base that an adapter names is never loaded: it may be gone, or another one by now.
    """
    if (folder / "adapter_config.json").exists():
        assert base is not None, f"{folder} is an adapter, and its base was not given"
        base_model = load_policy(base, model, device=device, over_gpus=over_gpus)
        return _with_adapter(base_model, folder)

    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], **placement(device, over_gpus)}
    if model.load_in_4bit:
        options["quantization_config"] = _four_bits(model)
    return load_exactly("CAUSAL_LM", folder, model, **options)


def _with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """The base with a LoRA adapter. Raises UserError if the adapter is not complete."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft only warns, and trains or scores with fresh adapters.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            # In the base's dtype, as it was trained.
            adapted: nn.Module = PeftModel.from_pretrained(
                base, str(folder), autocast_adapter_dtype=False
            )
        except UserWarning as warning:
            raise UserError(f"{folder} is not a complete adapter: {warning}") from None
    return adapted


def load_policy_float32(folder: Path, model: ModelConfig) -> nn.Module:
    """A policy to merge LoRA into: bfloat16 would round its small changes away."""
    return load_policy(folder, model.model_copy(update={"dtype": "float32"}))


def load_reward_model(
    folder: Path,
    model: ModelConfig,
    *,
    device: torch.device | None = None,
    over_gpus: bool = False,
) -> nn.Module:
    """A trained sequence classifier with one label, in the config's dtype, placed like a policy.

    Its head is in float32: in bfloat16 rewards between 4 and 8 would be multiples of 1/32.

    Raises:
        UserError: weights are missing, among them the head.
    """
    options = {"dtype": DTYPES[model.dtype], **placement(device, over_gpus)}
    loaded: Any = load_exactly("SEQ_CLS", folder, model, num_labels=1, **options)
    loaded.score.float().register_forward_pre_hook(_as_float32)
    return cast(nn.Module, loaded)


def _as_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(states.float() for states in inputs)


def load_classifier(
    folder: Path,
    model: ModelConfig,
    *,
    device: torch.device | None = None,
    over_gpus: bool = False,
) -> nn.Module:
    """A sequence classifier of others with one label, in its own dtype. Raises as above."""
    options = {
        "attn_implementation": None,  # what its architecture supports
        "dtype": "auto",
        **placement(device, over_gpus),
    }
    return load_exactly("SEQ_CLS", folder, model, num_labels=1, **options)


def new_reward_model(
    folder: Path, model: ModelConfig, *, device: torch.device | None = None
) -> nn.Module:
    """A language model with a new head of zeros, to train; its weights go to the device.

    All rewards start at 0: the first loss is ln 2, and there is no random direction to unlearn.
    """
    options = {"dtype": DTYPES[model.dtype], **placement(device)}
    loaded = load_exactly("SEQ_CLS", folder, model, (REWARD_HEAD,), num_labels=1, **options)
    weight: Any = loaded.score.weight  # type: ignore[union-attr]
    nn.init.zeros_(getattr(weight, "ds_tensor", weight))  # under ZeRO-3 this rank's shard
    return loaded


def load_exactly(
    task_type: TaskType,
    folder: Path,
    model: ModelConfig,
    new: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """A transformers model, all of whose weights come from the folder.

    Args:
        new: names of the only weights that the folder may lack.

    Raises:
        UserError: weights are missing or have another shape; transformers would draw them at
            random.
    """
    import transformers

    auto_class = getattr(transformers, AUTO_CLASSES[task_type])
    options = {"attn_implementation": model.attn_implementation, **options}
    with _quiet_load_report():
        loaded, report = auto_class.from_pretrained(
            folder,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all of them
            **options,
        )

    # transformers has drawn these at random.
    missing = sorted(set(report["missing_keys"]) - set(new))
    mismatched = sorted(str(name) for name, *_ in report["mismatched_keys"])
    # Weights that the model does not use: of a deeper one, or of another kind. Where a reward model
    # starts from a language model, the language-modelling head is not used.
    unexpected = set(report["unexpected_keys"]) - (LM_HEADS if new else set())
    unused = sorted(name for name in unexpected if not name.endswith(".masked_bias"))
    if missing or mismatched or unused:
        raise UserError(
            f"{folder} does not hold exactly a {type(loaded).__name__}: "
            f"{_list_weights('missing', missing)}{_list_weights('of another shape', mismatched)}"
            f"{_list_weights('not used', unused)}"
            "check that the folder is the right model and was copied completely"
        )
    if options.get("device_map") == OVER_GPUS:
        if not loaded._no_split_modules:  # a layer could be cut in two
            del loaded, report
            gc.collect()  # its hooks refer to it
            options["device_map"] = {"": torch.cuda.current_device()}
            return load_exactly(task_type, folder, model, new, **options)
        require_on_gpus(loaded, folder)
    if model.use_liger_kernel and not is_spread(loaded):  # they need all of a model on one GPU
        _use_liger(loaded)
    return cast(nn.Module, loaded)


def _use_liger(model: Any) -> None:
    """Fused kernels for norms, the rotary embedding and MLPs; not for the loss, which is our own.

    Raises:
        UserError: there are none for the architecture; Liger itself would do nothing.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    model_type = model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"model.use_liger_kernel: Liger has no kernels for {model_type} models: remove it"
        )
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _list_weights(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} weights are {what} ({shown}); "


@contextlib.contextmanager
def _quiet_load_report() -> Iterator[None]:
    """transformers prints a table of what it draws at random; it is an error here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bars:
            logging.enable_progress_bar()


def _four_bits(model: ModelConfig) -> "BitsAndBytesConfig":
    """QLoRA's settings (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
    )


def transformer_of(model: nn.Module) -> Any:
    """The transformers model, without a LoRA wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
