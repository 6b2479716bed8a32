"""The self-check at load: pairs are read only in ways that give the model's own numbers."""

import re
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.errors import UserError
from madpo_ray.models import attention
from madpo_ray.models.logprobs import ResponseLogps, ResponseRewards
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.models.reading import NARROW_WINDOW, TOLERANCES, Reading, find_reading
from support.forwards import PAIRS, separate_logps
from support.models import ARCHITECTURES, make_model, make_reward_model

CPU = torch.device("cpu")
PACKED = Reading(packed=True)
SEPARATE = Reading(packed=False)


def settings(**changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path="x", **changes)


def reading_of(module: Any, **changes: Any) -> Reading:
    return find_reading(module, CPU, settings(**changes))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_models_that_read_packed_rows(model_type: str, dtype: torch.dtype) -> None:
    assert reading_of(ResponseLogps(make_model(model_type).to(dtype))) == PACKED


def test_ranks_choose_the_same_way() -> None:
    """On another rank packed rows are as far from the model's own numbers as its hardware is."""
    module = ResponseLogps(make_model("llama"))
    elsewhere = iter([0.5, 0.0, 0.0])
    reading = find_reading(module, CPU, settings(), lambda own: max(own, next(elsewhere)))
    assert reading == Reading(packed=True, own_forward=True)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("stablelm", "do not hand packed_row over"),
        ("nemotron", "do not hand packed_row over"),
        ("bloom", "attention cannot be replaced"),  # positions by distance (ALiBi)
        ("mpt", "attention cannot be replaced"),
        ("gpt_oss", "attention also reads s_aux"),  # attention sinks
    ],
)
def test_models_that_read_a_row_per_response(
    model_type: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    has_own_names = model_type in ("bloom", "mpt")
    sizes = {"n_layer": 2, "n_head": 4, "n_heads": 4, "n_layers": 2} if has_own_names else {}
    model = make_model(model_type, attention="eager", **sizes)
    module = ResponseLogps(model)
    with caplog.at_level("WARNING"):
        reading = reading_of(module, attn_implementation="eager")
    assert reading == SEPARATE
    assert f"{model_type} reads one row per response: slower, same numbers" in reading.note
    assert why in reading.note
    assert reading.note in caplog.text
    with torch.no_grad():
        logps = module(collate(PAIRS, packed=False))["logps"]
        torch.testing.assert_close(logps, separate_logps(model), rtol=0, atol=1e-4)


class Scaled(torch.nn.Module):
    """A model that multiplies its logits after the head, as Falcon-H1 does, by no known name."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, **inputs: Any) -> Any:
        output = self.wrapped(**inputs)
        output.logits = output.logits * 0.5
        return output


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_a_factor_after_the_head_is_found(dtype: torch.dtype) -> None:
    """In bfloat16, too."""
    reading = reading_of(ResponseLogps(Scaled(make_model().to(dtype))))
    assert reading == Reading(packed=True, own_forward=True)
    assert "packed rows, all logits" in reading.note


def test_a_factor_after_the_head_is_not_lost() -> None:
    model = Scaled(make_model())
    module = ResponseLogps(model)
    reading_of(module)
    outputs = module(collate(PAIRS, packed=True))
    torch.testing.assert_close(outputs["logps"], separate_logps(model), rtol=0, atol=1e-4)

    # Gradients as well.
    parameters = list(model.parameters())
    ours = torch.autograd.grad(outputs["logps"].sum(), parameters)
    theirs = torch.autograd.grad(separate_logps(model).sum(), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.5}, Reading(False, own_forward=True)),
        ("qwen3_next", {}, SEPARATE),
        ("jamba", {}, SEPARATE),
        ("minimax", {}, SEPARATE),
    ],
)
def test_recurrent_layers_read_separate_rows(
    model_type: str, changes: dict[str, Any], expected: Reading
) -> None:
    model = make_model(model_type, **changes)
    module = ResponseLogps(model)
    assert reading_of(module) == expected
    with torch.no_grad():
        logps = module(collate(PAIRS, packed=False))["logps"]
    torch.testing.assert_close(logps, separate_logps(model), rtol=0, atol=1e-3)


def test_a_window_that_short_pairs_would_not_show_is_compared() -> None:
    """Attention without the window: windows are narrowed for the check, and put back."""
    model = make_model("mistral", sliding_window=4096)
    widths: list[int] = []

    def without_window(*states: Any, sliding_window: int, **others: Any) -> Any:
        widths.append(sliding_window)
        return attention.packed_attention(*states, **others)

    AttentionInterface.register(attention.PACKED, without_window)
    try:
        reading = reading_of(ResponseLogps(model))
    finally:
        AttentionInterface.register(attention.PACKED, attention.packed_attention)
    assert reading == SEPARATE
    assert re.search(r"packed rows: 0\.\d", reading.note)
    assert set(widths) == {4096, NARROW_WINDOW}
    assert model.config.sliding_window == 4096


def test_a_model_that_no_way_can_read_is_refused() -> None:
    """Log-probs that depend on the other rows of a batch."""
    model = make_model()
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _, inputs, output: output + output.mean(0, keepdim=True))
    message = r"llama model gives other numbers in a batch .*one row per response: 0\.\d"
    with pytest.raises(UserError, match=message):
        reading_of(ResponseLogps(model), packed_rows="off")


def test_a_reading_that_is_not_finite_is_none() -> None:
    model = make_model()
    model.model.norm.register_forward_hook(
        lambda _, inputs, output: output * (1.0 if len(output) == 1 else torch.nan)
    )
    with pytest.raises(UserError, match="one row per response, all logits: not finite"):
        reading_of(ResponseLogps(model), packed_rows="off")


def test_weights_that_are_not_finite_are_refused() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="own numbers are not finite"):
        reading_of(ResponseLogps(model))


def test_what_a_model_raises_is_shown() -> None:
    model = make_model()

    def only_single_rows(_: Any, inputs: Any) -> None:
        assert len(inputs[0]) == 1, "one row at a time"

    model.model.embed_tokens.register_forward_pre_hook(only_single_rows)
    with pytest.raises(UserError, match="AssertionError: one row at a time"):
        reading_of(ResponseLogps(model), packed_rows="off")


def test_packing_can_be_turned_off() -> None:
    reading = reading_of(ResponseLogps(make_model()), packed_rows="off")
    assert (reading, reading.note) == (SEPARATE, "")


@pytest.mark.parametrize("is_fresh", [True, False])
def test_reward_models_are_compared_too(is_fresh: bool) -> None:
    """Also one whose head is still zero: its last states are compared."""
    model = make_reward_model()
    if is_fresh:
        torch.nn.init.zeros_(model.score.weight)
    assert reading_of(ResponseRewards(model)) == PACKED
    model.model.norm.register_forward_hook(
        lambda _, inputs, output: (
            output * (1 + output.shape[0])  # batches differ from single rows
            + torch.arange(output.shape[0])[:, None, None]
        )
    )
    with pytest.raises(UserError, match="other numbers in a batch"):
        reading_of(ResponseRewards(model), packed_rows="off")


def test_the_random_state_and_the_model_are_left_alone() -> None:
    model = prepare_for_training(
        make_model(), PolicyConfig(use_peft=True, lora_r=4), task_type="CAUSAL_LM"
    ).eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert reading_of(ResponseLogps(model)) == PACKED
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("bert", {}), ("electra", {"embedding_size": 32}), ("roformer", {"embedding_size": 32})],
)
def test_models_that_see_later_tokens_are_refused(model_type: str, changes: dict[str, Any]) -> None:
    """transformers offers encoders as causal language models."""
    model = make_model(model_type, attention="eager", **changes)
    with pytest.raises(UserError, match=f"the {model_type} model sees the tokens after the one"):
        reading_of(ResponseLogps(model), attn_implementation="eager")


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("make", [make_model, make_reward_model])
def test_a_causal_architecture_may_be_told_to_look_ahead(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("eager")
    model.model.register_forward_pre_hook(
        lambda _, args, inputs: (args[:1], {**inputs, "attention_mask": full(args, inputs, dtype)}),
        with_kwargs=True,
    )
    module = ResponseLogps(model) if make is make_model else ResponseRewards(model)
    with pytest.raises(UserError, match="sees the tokens after the one that it predicts"):
        reading_of(module, attn_implementation="eager")


def full(args: Any, inputs: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """A mask that hides nothing."""
    rows, length = (args[0] if args else inputs["input_ids"]).shape
    return torch.zeros(rows, 1, length, length, dtype=dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_a_reward_counts_as_much_as_its_state(dtype: torch.dtype) -> None:
    """A model that does more after its head: 0.2 more is a wrong reward, however long the state."""
    model = make_reward_model().to(dtype)
    model.register_forward_hook(
        lambda _, inputs, output: setattr(output, "logits", output.logits + 0.2)
    )
    with pytest.raises(UserError, match="other numbers in a batch"):
        reading_of(ResponseRewards(model))
