"""Loading models, and refusing what cannot be trained."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from madpo_ray.config import ModelConfig, PolicyConfig, RewardConfig
from madpo_ray.data.batching import collate
from madpo_ray.errors import UserError
from madpo_ray.models.checks import check_weights
from madpo_ray.models.loading import (
    load_classifier,
    load_policy,
    load_policy_float32,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
)
from madpo_ray.models.logprobs import ResponseLogps, ResponseRewards
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.models.reading import Reading, find_reading, require_no_dropout
from madpo_ray.models.saving import save_model, saved_tensors
from madpo_ray.models.trainable import check_trainable
from support.forwards import PAIRS
from support.models import make_model, make_reward_model, tiny_config

STARCODER_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_target_modules": ["q_prj"]},
            "llama has no module 'q_prj'; did you mean 'q_proj'?",
        ),
        (
            {"lora_target_modules": ["q_proj"], "lora_layers_to_transform": [1, 2]},
            "lora_layers_to_transform: the model has layers 0 to 1, not [2]",
        ),
        ({"lora_target_modules": ["norm"]}, "lora_target_modules: Target module LlamaRMSNorm"),
        ({"lora_target_modules": ["layers"]}, "lora_target_modules: Target module"),
    ],
)
def test_refuses_lora_without_its_modules(
    changes: dict[str, Any], message: str, model_folder: Path
) -> None:
    settings = PolicyConfig(use_peft=True, **changes)
    model = ModelConfig(model_name_or_path=str(model_folder))
    with pytest.raises(UserError, match=re.escape(message)):
        check_trainable(model_folder, model, settings, task_type="CAUSAL_LM")


def test_refuses_a_model_without_reward_head(tmp_path: Path) -> None:
    tiny_config("cohere").save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path))
    check_trainable(tmp_path, model, PolicyConfig(), task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="no AutoModelForSequenceClassification of cohere"):
        check_trainable(tmp_path, model, RewardConfig(), task_type="SEQ_CLS")


def test_refuses_attention_that_the_model_lacks(tmp_path: Path) -> None:
    tiny_config("gptj").save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path), attn_implementation="sdpa")
    with pytest.raises(UserError, match="no AutoModelForCausalLM of gptj with sdpa"):
        check_trainable(tmp_path, model, PolicyConfig(), task_type="CAUSAL_LM")


def test_policy_has_the_configs_dtype(model_folder: Path) -> None:
    model = ModelConfig(model_name_or_path=str(model_folder), dtype="bfloat16")
    assert next(load_policy(model_folder, model).parameters()).dtype == torch.bfloat16
    assert next(load_policy_float32(model_folder, model).parameters()).dtype == torch.float32


def test_reward_model_has_the_configs_dtype(model_folder: Path, tmp_path: Path) -> None:
    """Merged LoRA is saved in float32, and scored in what the reference is."""
    model = ModelConfig(model_name_or_path=str(model_folder))
    trained: Any = new_reward_model(model_folder, model)
    save_model(trained, saved_tensors(trained), tmp_path)
    for dtype in ("float32", "bfloat16"):
        loaded: Any = load_reward_model(tmp_path, model.model_copy(update={"dtype": dtype}))
        assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
        assert loaded.score.weight.dtype == torch.float32


def test_rewards_in_bfloat16_are_not_rounded(tmp_path: Path) -> None:
    """Between 4 and 8 they would be multiples of 1/32, and margins would tie."""
    make_reward_model().save_pretrained(tmp_path)
    settings = ModelConfig(model_name_or_path=str(tmp_path), dtype="bfloat16")
    model: Any = load_reward_model(tmp_path, settings)
    with torch.no_grad():
        model.score.weight.mul_(50)
        module = ResponseRewards(model)
        assert find_reading(module, torch.device("cpu"), settings).packed
        batch = collate(PAIRS, packed=True)
        states = module._last_states(batch)
        rewards = module(batch)["rewards"]
    assert states.dtype == torch.bfloat16
    expected = states.float() @ model.score.weight[0]
    torch.testing.assert_close(rewards, expected)
    assert not rewards.equal(rewards.bfloat16().float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_have_the_models_dtype(dtype: str, model_folder: Path) -> None:
    """In float32 next to bfloat16 they would make layers keep their inputs twice."""
    model = ModelConfig(model_name_or_path=str(model_folder), dtype=dtype)
    settings = PolicyConfig(use_peft=True, lora_r=4)
    adapted = prepare_for_training(
        load_policy(model_folder, model), settings, task_type="CAUSAL_LM"
    )
    assert {p.dtype for p in adapted.parameters()} == {getattr(torch, dtype)}


def test_new_reward_head_is_zero(model_folder: Path) -> None:
    """All rewards start at 0, so the first loss is ln 2."""
    model = ModelConfig(model_name_or_path=str(model_folder))
    loaded: Any = new_reward_model(model_folder, model)
    assert loaded.config.num_labels == 1
    assert not loaded.score.weight.any()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("starcoder2", dict.fromkeys(STARCODER_DROPOUTS, 0.3)),
        ("seed_oss", {"residual_dropout": 0.3}),
        ("opt", {"layerdrop": 0.5}),
        ("biogpt", {"activation_dropout": 0.3, "layerdrop": 0.5}),
        ("bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
    ],
)
def test_disable_dropout_reaches_every_kind_of_dropout(
    model_type: str, changes: dict[str, Any]
) -> None:
    """A policy in training has the numbers of the reference, which was scored without dropout."""
    attention = "eager" if model_type == "bloom" else ""
    reading = Reading(packed=model_type != "bloom")
    device = torch.device("cpu")
    for is_disabled in (True, False):
        settings = PolicyConfig(disable_dropout=is_disabled)
        model = make_model(model_type, attention=attention, **changes)
        module = ResponseLogps(prepare_for_training(model, settings, task_type="CAUSAL_LM"))
        if is_disabled:
            require_no_dropout(module, device, reading)
        else:
            with pytest.raises(UserError, match="computes other numbers in training"):
                require_no_dropout(module, device, reading)
        assert not module.training


def test_disable_dropout_reaches_every_module() -> None:
    config_dropout = {"attention_dropout": 0.3}
    settings = PolicyConfig(use_peft=True, lora_r=4, lora_dropout=0.2)
    model = prepare_for_training(make_model(**config_dropout), settings, task_type="CAUSAL_LM")
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(dropouts)
    assert not any(getattr(m, "attention_dropout", 0.0) for m in model.modules())

    settings = settings.model_copy(update={"disable_dropout": False})
    model = prepare_for_training(make_model(**config_dropout), settings, task_type="CAUSAL_LM")
    assert any(getattr(m, "attention_dropout", 0.0) == 0.3 for m in model.modules())


def spoiled(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


LAYER = "model.layers.0.self_attn.q_proj.weight"
SPOILED = {
    "head": (lambda w: w.pop("lm_head.weight"), "1 weights are missing (lm_head.weight)"),
    "layer": (lambda w: w.pop(LAYER), f"1 weights are missing ({LAYER})"),
    "shape": (lambda w: w.update({LAYER: w[LAYER][:16].clone()}), "1 weights are of another shape"),
    "deeper": (
        lambda w: w.update({LAYER.replace("0", "2"): w[LAYER].clone()}),
        "1 weights are not used (model.layers.2.self_attn.q_proj.weight)",
    ),
    "prefix": (
        lambda w: w.update({f"x.{name}": w.pop(name) for name in list(w)}),
        "weights are missing (",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("load", [load_policy, load_policy_float32, check_weights])
def test_no_weight_is_filled_in(
    name: str, load: Callable[..., Any], model_folder: Path, tmp_path: Path
) -> None:
    """transformers would draw it at random, and only print a table."""
    edit, message = SPOILED[name]
    folder = spoiled(model_folder, tmp_path / "spoiled", edit)
    model = ModelConfig(model_name_or_path=str(folder))
    options = {"task_type": "CAUSAL_LM"} if load is check_weights else {}
    with pytest.raises(UserError, match=re.escape(message)):
        load(folder, model, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU holds the model")
def test_model_that_is_larger_than_the_gpus_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Its last layers would be fetched from the host in each forward."""
    model = ModelConfig(model_name_or_path=str(model_folder))
    with pytest.raises(UserError, match=r"do not fit .* 0 GPUs of one actor: raise scoring"):
        load_policy(model_folder, model, over_gpus=True)
    make_reward_model().save_pretrained(tmp_path)
    for load in (load_reward_model, load_classifier):
        with pytest.raises(UserError, match=r"raise scoring\.gpus_per_actor"):
            load(tmp_path, model, over_gpus=True)


def test_broken_tokenizer_is_named(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"the tokenizer of {folder} cannot be loaded"):
        load_tokenizer(folder, ModelConfig(model_name_or_path=str(folder)))


def test_scoring_needs_the_reward_head(model_folder: Path, tmp_path: Path) -> None:
    """Only a training may start with a new one."""
    model = ModelConfig(model_name_or_path=str(model_folder))
    with pytest.raises(UserError, match=r"1 weights are missing \(score\.weight\)"):
        load_reward_model(model_folder, model)
    make_reward_model().save_pretrained(tmp_path / "reward")
    load_reward_model(tmp_path / "reward", model)


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi"])
def test_heads_of_other_names_are_left_out_of_reward_models(
    model_type: str, tmp_path: Path
) -> None:
    """Pythia's is embed_out, Phi's has a bias."""
    make_model(model_type).save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path))
    check_weights(tmp_path, model, task_type="SEQ_CLS")
    assert not new_reward_model(tmp_path, model).score.weight.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("targets", "missing"),
    [
        (["q_proj", "mlp.v_proj"], "mlp.v_proj"),
        (["layers.5.self_attn.q_proj", "v_proj"], "layers.5.self_attn.q_proj"),
    ],
)
def test_every_lora_target_matches(targets: list[str], missing: str, model_folder: Path) -> None:
    """peft is content if one does."""
    settings = PolicyConfig(use_peft=True, lora_target_modules=targets)
    model = ModelConfig(model_name_or_path=str(model_folder))
    with pytest.raises(UserError, match=f"llama has no module '{missing}'"):
        check_trainable(model_folder, model, settings, task_type="CAUSAL_LM")


def test_tied_head_is_not_missing(tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_policy(tmp_path, ModelConfig(model_name_or_path=str(tmp_path)))


def test_incomplete_adapter_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """peft would only warn, and use fresh weights."""
    settings = PolicyConfig(use_peft=True, lora_r=4)
    model = ModelConfig(model_name_or_path=str(model_folder))
    adapted: Any = prepare_for_training(
        load_policy(model_folder, model), settings, task_type="CAUSAL_LM"
    )
    adapted.save_pretrained(tmp_path)
    load_policy(tmp_path, model, base=model_folder)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not a complete adapter"):
        load_policy(tmp_path, model, base=model_folder)
