"""Whether a model can be trained as the settings say: its architecture, without its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from madpo_ray.config import ModelConfig, TrainingConfig
from madpo_ray.errors import UserError, did_you_mean
from madpo_ray.models.attention import load_architecture
from madpo_ray.models.loading import AUTO_CLASSES, TaskType, remote_code
from madpo_ray.models.preparing import with_lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' model classes take seconds to import: they are imported inside functions.


def check_trainable(
    folder: Path, model: ModelConfig, settings: TrainingConfig, *, task_type: TaskType
) -> None:
    """Checks a model's architecture, without its weights. Raises as `check_architecture` does."""
    architecture = load_architecture(folder, trust_remote_code=model.trust_remote_code)
    check_architecture(architecture, model, settings, task_type=task_type)


def check_architecture(
    architecture: "PretrainedConfig",
    model: ModelConfig,
    settings: TrainingConfig,
    *,
    task_type: TaskType,
) -> None:
    """Checks transformers' config of a model.

    Raises:
        UserError: transformers has no such model with this head and attention, or LoRA's settings
            name what the model does not have.
    """
    import transformers

    kernel: str | None = model.attn_implementation
    if kernel == "flash_attention_2":
        kernel = None  # checked on the workers; the driver may have no GPU

    # The architecture with this head and this attention, without weights.
    try:
        with torch.device("meta"):
            skeleton = getattr(transformers, AUTO_CLASSES[task_type]).from_config(
                architecture,
                attn_implementation=kernel,
                **remote_code(model),
            )
    except ValueError as error:
        raise UserError(
            f"model: no {AUTO_CLASSES[task_type]} of {architecture.model_type} with "
            f"{model.attn_implementation}: {error}"
        ) from None
    if task_type == "SEQ_CLS" and not hasattr(skeleton, "score"):
        raise UserError(
            f"model.model_name_or_path: the {type(skeleton).__name__} has no linear head named "
            "score"
        )
    if settings.use_peft:
        _check_lora(skeleton, settings, task_type)


def _check_lora(skeleton: Any, settings: TrainingConfig, task_type: TaskType) -> None:
    names = {name.rsplit(".", 1)[-1] for name, _ in skeleton.named_modules() if name}
    num_layers = int(skeleton.config.get_text_config().num_hidden_layers)
    beyond = [i for i in settings.lora_layers_to_transform if not 0 <= i < num_layers]
    if beyond:
        raise UserError(
            f"lora_layers_to_transform: the model has layers 0 to {num_layers - 1}, not {beyond}"
        )

    # What peft makes of it.
    targets = [one for one in settings.lora_target_modules if one != "all-linear"]
    adapted: list[str] = []
    try:
        with torch.device("meta"):
            model: Any = with_lora(skeleton, settings, task_type)
        adapted = model.targeted_module_names
    except ValueError as error:  # such as a target that is no linear layer
        if all(target.rsplit(".", 1)[-1] in names for target in targets):
            raise UserError(f"lora_target_modules: {error}") from None
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in adapted):
            raise UserError(
                f"lora_target_modules: {skeleton.config.model_type} has no module "
                f"{target!r}{did_you_mean(target, names)}"
            )
