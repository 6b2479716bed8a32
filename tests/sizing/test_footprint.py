"""Footprints without memory equal those of real tensors."""

from typing import Any

import pytest
import torch

from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.errors import UserError
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.sizing import footprint
from madpo_ray.sizing.footprint import Footprint, Shape, measure_footprint, reads_packed_rows
from madpo_ray.sizing.peak import PeakMemory, drop_gradient
from support.models import make_model

SHAPE = Shape(pairs=2, prompt_tokens=9, response_tokens=5)
MODEL = ModelConfig(model_name_or_path="x")


def measured(architecture: Any, **settings: Any) -> Footprint:
    return measure_footprint(
        architecture,
        MODEL,
        SHAPE,
        task_type="CAUSAL_LM",
        settings=PolicyConfig(**settings) if settings.pop("trains", True) else None,
        packed=reads_packed_rows(architecture, MODEL),
        on_gpu=False,
    )


def real_peak(model: torch.nn.Module, settings: PolicyConfig) -> int:
    """The same count over tensors that exist."""
    module = ResponseLogps(prepare_for_training(model, settings, task_type="CAUSAL_LM")).train()
    batch = footprint._micro_batch(SHAPE, ("chosen_ids", "rejected_ids"), packed=True)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    tracker = PeakMemory([*module.parameters(), *module.buffers()])
    with tracker:
        module(batch)["logps"].sum().backward()
    return tracker.peak


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"use_peft": True, "lora_r": 2}],
    ids=["all", "recomputed", "lora"],
)
def test_equals_a_real_model(settings: dict[str, Any]) -> None:
    model = make_model("llama")
    found = measured(model.config, **settings)
    count = sum(p.numel() for p in model.parameters())
    assert found.tokens == 2 * (9 + 2 * 5)
    assert found.activations == pytest.approx(real_peak(model, PolicyConfig(**settings)), rel=0.01)
    if settings.get("use_peft"):
        assert 0 < found.trained == found.parameters - count
    else:
        assert found.trained == found.parameters == count


def test_layers_add_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with more layers is extrapolated from few."""
    architecture = make_model("llama").config
    architecture.num_hidden_layers = 9
    extrapolated = measured(architecture)
    monkeypatch.setattr(footprint, "MORE_LAYERS", 9)
    assert extrapolated == measured(architecture)


def test_settings_of_each_layer_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 names the attention of each layer."""
    architecture = make_model("gemma3_text").config
    architecture.num_hidden_layers = 6
    architecture.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    extrapolated = measured(architecture)
    monkeypatch.setattr(footprint, "MORE_LAYERS", 6)
    assert extrapolated.activations == pytest.approx(measured(architecture).activations, rel=0.1)


def test_lora_of_some_layers_is_not_extrapolated() -> None:
    architecture = make_model("llama").config
    architecture.num_hidden_layers = 6
    some = {"lora_target_modules": ("q_proj",), "lora_layers_to_transform": (5,)}
    assert measured(architecture, use_peft=True, **some).trained > 0


def test_forward_only_footprint() -> None:
    architecture = make_model("llama").config
    forward = measured(architecture, trains=False)
    trained = measured(architecture)
    assert forward.trained == 0
    assert forward.activations < trained.activations / 2
    assert forward.flops == pytest.approx(trained.flops / 3, rel=0.2)


def test_gpus_keep_grouped_keys_as_they_are() -> None:
    """On a CPU each head has a copy of its group's keys and values."""
    architecture = make_model("llama", head_dim=8).config
    model = MODEL.model_copy(update={"dtype": "bfloat16"})
    on_gpu, on_cpu = (
        measure_footprint(
            architecture,
            model,
            SHAPE,
            task_type="SEQ_CLS",
            settings=PolicyConfig(),
            packed=True,
            on_gpu=on_gpu,
        ).activations
        for on_gpu in (True, False)
    )
    assert 0 < on_gpu < on_cpu


SHARING = {"num_hidden_layers": 12, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 400}


@pytest.mark.parametrize(
    ("model_type", "changes", "packed"),
    [
        ("stablelm", {}, False),
        ("nemotron", {}, False),
        ("gemma3n_text", SHARING, True),
        ("gemma4_text", SHARING, True),
    ],
)
def test_models_of_other_kinds_are_planned(
    model_type: str, changes: dict[str, Any], packed: bool
) -> None:
    """Layers that read no packed rows, that share keys and values, or that differ."""
    model = make_model(model_type, **changes)
    found = measured(model.config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.activations > 0
    assert reads_packed_rows(model.config, MODEL) is packed


def test_flash_attention_is_planned_as_another() -> None:
    model = MODEL.model_copy(update={"attn_implementation": "flash_attention_2"})
    architecture = make_model("gemma2").config
    found = measure_footprint(
        architecture,
        model,
        SHAPE,
        task_type="CAUSAL_LM",
        settings=PolicyConfig(),
        packed=reads_packed_rows(architecture, model),
    )
    assert found.activations > 0


def test_routed_experts_are_refused() -> None:
    with pytest.raises(UserError, match="mixtral model cannot be planned"):
        measured(make_model("mixtral").config)
