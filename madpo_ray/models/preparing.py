"""Make a loaded model ready to train: LoRA, dropout, activation checkpointing."""

import warnings

from torch import nn

from madpo_ray.config import TrainingConfig
from madpo_ray.models.loading import TaskType

# peft takes seconds to import: it is imported inside a function.


def prepare_for_training(
    model: nn.Module, settings: TrainingConfig, *, task_type: TaskType
) -> nn.Module:
    """Adds LoRA, sets dropout and turns on activation checkpointing, according to the settings."""
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(  # type: ignore[operator]
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
        if settings.use_peft:
            model.enable_input_require_grads()  # type: ignore[operator]
    if settings.use_peft:
        model = with_lora(model, settings, task_type)
    if settings.disable_dropout:
        _zero_dropout(model)
    return model


def with_lora(model: nn.Module, settings: TrainingConfig, task_type: TaskType) -> nn.Module:
    """The model with fresh adapters. Raises ValueError if peft finds no module for them."""
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
    with warnings.catch_warnings():
        # peft 0.21 reads the old name of an attribute of transformers 5.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # Adapters have the model's dtype: DeepSpeed would cast them below stage 3 only.
        adapted: nn.Module = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return adapted


def _zero_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Numbers that layers read at each forward, such as attention_dropout, residual_dropout,
        # layerdrop and router_jitter_noise.
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
