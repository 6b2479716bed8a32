"""Log-probs, entropy and rewards of responses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.data.batching import MicroBatch, PackedRow, collate
from madpo_ray.losses import dpo_loss
from madpo_ray.models.attention import use_attention
from madpo_ray.models.logprobs import TOKENS_PER_CHUNK, ResponseLogps, ResponseRewards, target_logps
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.models.reading import Reading, find_reading
from support.forwards import PAIRS, separate_logps
from support.models import make_model, make_reward_model

SETTINGS = ModelConfig(model_name_or_path="x")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.3})],
)
def test_logits_are_scaled_as_the_model_does(model_type: str, changes: dict[str, Any]) -> None:
    model = make_model(model_type, **changes)
    outputs = ResponseLogps(model)(collate(PAIRS, packed=False))
    torch.testing.assert_close(outputs["logps"], separate_logps(model), rtol=0, atol=1e-4)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither log-probs nor gradients."""
    model = make_model()
    batch = collate(PAIRS, packed=True)
    complete = ResponseLogps(model)(batch)
    grads = torch.autograd.grad(complete["logps"].sum(), list(model.parameters()))
    monkeypatch.setitem(TOKENS_PER_CHUNK, "cpu", 7)
    chunked = ResponseLogps(model, max_response_tokens=200)(batch)
    torch.testing.assert_close(chunked["logps"], complete["logps"])
    torch.testing.assert_close(chunked["entropy"], complete["entropy"])
    again = torch.autograd.grad(chunked["logps"].sum(), list(model.parameters()))
    torch.testing.assert_close(again, grads)


def test_head_is_called_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 another number on another rank would hang: the bound decides, not the batch."""
    monkeypatch.setitem(TOKENS_PER_CHUNK, "cpu", 7)
    model = make_model()
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for pairs in (PAIRS, PAIRS[:1]):
            ResponseLogps(model, max_response_tokens=200)(collate(pairs, packed=True))
    assert len(calls) == 2 * 29


@pytest.mark.parametrize("make", [make_model, make_reward_model])
def test_packed_rows_pass_between_devices(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's hooks bring a layer's inputs to its device, the row's spans among them.

    The second device of a machine without GPUs is a file, read in each forward.
    """
    places = []
    copy = PackedRow.to

    def noted(row: PackedRow, device: torch.device, **options: bool) -> PackedRow:
        places.append(device)
        return copy(row, device, **options)

    monkeypatch.setattr(PackedRow, "to", noted)
    module_class = ResponseLogps if make is make_model else ResponseRewards
    batch = collate(PAIRS, packed=True)
    model = make()
    with torch.no_grad():
        expected = module_class(model).numbers_to_compare(batch)
        assert not places
        device_map = dict.fromkeys(layers_of(model), "cpu") | {"model.layers.1": "disk"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
        module = module_class(model)
        assert find_reading(module, torch.device("cpu"), SETTINGS) == Reading(packed=True)
        places.clear()
        numbers = module.numbers_to_compare(batch)
    assert places
    torch.testing.assert_close(numbers, expected, rtol=0, atol=0)


def layers_of(model: Any) -> list[str]:
    """Names of the modules that may be on devices of their own."""
    layers = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    return [
        *layers,
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head" if hasattr(model, "lm_head") else "score",
    ]


def test_entropy_is_the_mean_over_response_tokens() -> None:
    model = make_model()
    pair = PAIRS[0]
    entropy = ResponseLogps(model)(collate([pair], packed=True))["entropy"][0]
    ids = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])
    use_attention(model, packed=False)
    logits = model(input_ids=ids).logits[0, len(pair["prompt_ids"]) - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_rewards_are_read_at_the_last_token(packed: bool) -> None:
    model = make_reward_model()
    rewards = ResponseRewards(model)(collate(PAIRS, packed=packed))["rewards"]
    use_attention(model, packed=False)
    for side, values in zip(("chosen_ids", "rejected_ids"), rewards.chunk(2), strict=True):
        for pair, value in zip(PAIRS, values, strict=True):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(value, model.score(hidden)[0], rtol=1e-4, atol=1e-5)


def padded_on_the_left(batch: MicroBatch) -> MicroBatch:
    shift = batch.input_ids.shape[1] - batch.attention_mask.sum(1)

    def rolled(tensor: torch.Tensor) -> torch.Tensor:
        rows = zip(tensor, shift, strict=True)
        return torch.stack([row.roll(int(by)) for row, by in rows])

    mask = rolled(batch.attention_mask)
    return dataclasses.replace(
        batch,
        input_ids=rolled(batch.input_ids),
        attention_mask=mask,
        last_index=batch.last_index + shift,
    )


def test_rewards_do_not_depend_on_the_padding_side() -> None:
    model = make_reward_model()
    right = collate(PAIRS, packed=False)
    expected = ResponseRewards(model)(right)["rewards"]
    rewards = ResponseRewards(model)(padded_on_the_left(right))["rewards"]
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_peft", [False, True])
def test_first_loss_is_ln_2(use_peft: bool) -> None:
    """Although the reference saw the pairs in one batch, and training sees them by two."""
    settings = PolicyConfig(use_peft=use_peft, lora_r=4)
    policy = prepare_for_training(make_model(), settings, task_type="CAUSAL_LM").train()
    with torch.no_grad():
        reference = ResponseLogps(make_model())(collate(PAIRS, packed=True))["logps"]
        ref_chosen, ref_rejected = reference.chunk(2)
        for i in range(0, 4, 2):
            batch = collate(PAIRS[i : i + 2], packed=True)
            chosen, rejected = ResponseLogps(policy)(batch)["logps"].chunk(2)
            chosen = chosen - ref_chosen[i : i + 2]
            rejected = rejected - ref_rejected[i : i + 2]
            torch.testing.assert_close(chosen - rejected, torch.zeros(2), rtol=0, atol=1e-5)
            loss = dpo_loss(chosen - rejected, beta=0.1)
            torch.testing.assert_close(loss, torch.full((2,), 2.0).log(), rtol=0, atol=1e-6)


def test_target_logps_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(4, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 3, 10, 3])
    logps, entropy = target_logps(logits, targets)
    exact = logits.log_softmax(-1)
    exact_logps = exact.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, exact_logps)
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(-1))

    weights = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    expected = torch.autograd.grad((exact_logps * weights).sum(), logits)
    torch.testing.assert_close(torch.autograd.grad((logps * weights).sum(), logits), expected)


def test_target_logps_of_huge_logits() -> None:
    huge = torch.tensor([[200.0, -200.0, 0.0]], dtype=torch.bfloat16).float()
    assert all(torch.isfinite(value).all() for value in target_logps(huge, torch.tensor([1])))
