"""One forward over shared rows against two separate, unpadded forwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, tiny_config

from madpo_ray.batching import collate
from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.logprobs import PairLogps, PairRewards, _TargetLogps
from madpo_ray.losses import dpo_loss
from madpo_ray.models import (
    SHARED_PREFIX_MODEL_TYPES,
    can_share_prefix,
    prepare_for_training,
    shares_prefix,
    takes_shared_rows,
)

GENERATOR = torch.Generator().manual_seed(3)


def random_ids(low: int, high: int) -> list[int]:
    return torch.randint(
        3, 400, (int(torch.randint(low, high, (), generator=GENERATOR)),), generator=GENERATOR
    ).tolist()


ROWS = [
    {"prompt_ids": random_ids(1, 20), "chosen_ids": random_ids(1, 12), "rejected_ids": random_ids(1, 12)}
    for _ in range(5)
]


def alone(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-prob of a response by a plain forward with full logits, one text at a time."""
    ids = torch.tensor([prompt + response])
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def all_alone(model: Any) -> torch.Tensor:
    return torch.stack(
        [alone(model, row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in ROWS]
    )


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma")},
    "mistral": ("mistral", {"sliding_window": None}),
    # Windows shorter than the rows.
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma2, window": ("gemma2", {"sliding_window": 8}),
    "gemma3, window": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
}


# Gemma 2 has no SDPA in transformers.
CASES = [
    (name, attention)
    for name in MODELS
    for attention in ("sdpa", "eager")
    if (name[:6], attention[0]) != ("gemma2", "s")
]


@pytest.mark.parametrize(("name", "attention"), CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_rows_equal_separate_forwards(name: str, attention: str, checkpointing: bool) -> None:
    model_type, changes = MODELS[name]
    model = make_model(model_type, **changes)
    model.set_attn_implementation(attention)
    assert can_share_prefix(model.config, attention)
    expected = all_alone(model)
    if checkpointing:
        prepare_for_training(model, PolicyConfig(gradient_checkpointing=True), task_type="CAUSAL_LM").train()
    outputs = PairLogps(model)(collate(ROWS, shared_prefix=True))
    torch.testing.assert_close(outputs["logps"], expected, rtol=0, atol=1e-4)

    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, len(expected))
    ours = torch.autograd.grad((outputs["logps"] * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine is None) == (their is None)
        if mine is not None and their is not None:
            assert (mine - their).norm() <= 1e-5 * their.norm() + 1e-7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it first compiles
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])
def test_flex_attention_takes_shared_rows(name: str) -> None:
    # Its gradients are for GPUs; GPT-2 has none of it in transformers.
    model_type, changes = MODELS[name]
    model = make_model(model_type, **changes)
    expected = all_alone(model)
    model.set_attn_implementation("flex_attention")
    assert can_share_prefix(model.config, "flex_attention")
    with torch.no_grad():
        outputs = PairLogps(model)(collate(ROWS, shared_prefix=True))
    torch.testing.assert_close(outputs["logps"], expected, rtol=0, atol=1e-4)


def test_windows_matter_to_these_models() -> None:
    # Else the test above could not see a window that a mask drops.
    narrow, wide = make_model("mistral", sliding_window=8), make_model("mistral", sliding_window=None)
    assert (all_alone(narrow) - all_alone(wide)).abs().max() > 1e-2


def test_models_that_cannot_share_are_read_as_two_rows(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, settings = make_model("cohere"), ModelConfig(model_name_or_path="x")
    assert not shares_prefix(model, settings)
    model.config.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        assert not takes_shared_rows(tmp_path, settings)
        assert not takes_shared_rows(tmp_path, settings)
    assert caplog.text.count("two rows") == 1
    outputs = PairLogps(model)(collate(ROWS, shared_prefix=False))
    torch.testing.assert_close(outputs["logps"], all_alone(model), rtol=0, atol=1e-4)


def test_linear_attention_never_shares() -> None:
    assert not can_share_prefix(tiny_config("qwen3_next"), "sdpa")


def test_every_model_that_shares_is_tested() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == SHARED_PREFIX_MODEL_TYPES


@pytest.mark.parametrize("changes", [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.3})])
def test_logits_are_scaled_as_the_model_does(changes: tuple[str, dict[str, Any]]) -> None:
    model = make_model(changes[0], **changes[1])
    outputs = PairLogps(model)(collate(ROWS, shared_prefix=False))
    torch.testing.assert_close(outputs["logps"], all_alone(model), rtol=0, atol=1e-4)


def test_chunks_do_not_change_log_probs_or_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    batch = collate(ROWS, shared_prefix=True)
    whole = PairLogps(model)(batch)
    grads = torch.autograd.grad(whole["logps"].sum(), list(model.parameters()))
    monkeypatch.setattr("madpo_ray.logprobs.TOKENS_PER_CHUNK", 7)
    chunked = PairLogps(model, max_response_tokens=200)(batch)
    torch.testing.assert_close(chunked["logps"], whole["logps"])
    torch.testing.assert_close(chunked["entropy"], whole["entropy"])
    torch.testing.assert_close(torch.autograd.grad(chunked["logps"].sum(), list(model.parameters())), grads)


def test_entropy_is_the_mean_over_response_tokens() -> None:
    model, row = make_model(), ROWS[0]
    entropy = PairLogps(model)(collate([row], shared_prefix=True))["entropy"][0]
    logits = model(input_ids=torch.tensor([row["prompt_ids"] + row["chosen_ids"]])).logits[
        0, len(row["prompt_ids"]) - 1 : -1
    ]
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)


def make_reward_model() -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        tiny_config("llama", num_labels=1), attn_implementation="sdpa"
    ).eval()


@pytest.mark.parametrize("shared", [True, False])
def test_rewards_are_read_at_the_last_response_token(shared: bool) -> None:
    model = make_reward_model()
    rewards = PairRewards(model)(collate(ROWS, shared_prefix=shared))["rewards"]
    for side, values in zip(("chosen_ids", "rejected_ids"), rewards.chunk(2), strict=True):
        for row, value in zip(ROWS, values, strict=True):
            hidden = model.model(input_ids=torch.tensor([row["prompt_ids"] + row[side]])).last_hidden_state[0, -1]
            torch.testing.assert_close(value, model.score(hidden)[0], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_no_reward() -> None:
    import dataclasses

    model, right = make_reward_model(), collate(ROWS, shared_prefix=False)
    lengths = right.attention_mask.sum(1)
    shift = right.input_ids.shape[1] - lengths
    rolled = [
        torch.stack([r.roll(int(s)) for r, s in zip(t, shift, strict=True)])
        for t in (right.input_ids, right.attention_mask)
    ]
    left = dataclasses.replace(
        right,
        input_ids=rolled[0],
        attention_mask=rolled[1],
        position_ids=(rolled[1].cumsum(1) - 1).clamp(min=0),
        last_index=right.last_index + shift,
    )
    torch.testing.assert_close(
        PairRewards(model)(left)["rewards"], PairRewards(model)(right)["rewards"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_first_loss_is_ln_2(use_peft: bool) -> None:
    settings = PolicyConfig(use_peft=use_peft, lora_r=4)
    with torch.no_grad():
        reference = PairLogps(make_model())(collate(ROWS, shared_prefix=True))["logps"]
        # The reference saw the pairs in one batch; training sees them in batches of two.
        policy = PairLogps(prepare_for_training(make_model(), settings, task_type="CAUSAL_LM").train())
        for i in range(0, 4, 2):
            logps = policy(collate(ROWS[i : i + 2], shared_prefix=True))["logps"]
            chosen, rejected = (logps.chunk(2)[k] - reference.chunk(2)[k][i : i + 2] for k in (0, 1))
            torch.testing.assert_close(chosen - rejected, torch.zeros(2), rtol=0, atol=1e-5)
            loss = dpo_loss(chosen - rejected, beta=0.1)
            torch.testing.assert_close(loss, torch.full((2,), 2.0).log(), rtol=0, atol=1e-6)


def test_log_probs_and_entropy_of_logits_to_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(4, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 3, 10, 3])
    logps, entropy = _TargetLogps.apply(logits, targets)
    exact = logits.log_softmax(-1)
    torch.testing.assert_close(logps, exact.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(-1))
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    expected = torch.autograd.grad((exact.gather(-1, targets[:, None])[:, 0] * weights).sum(), logits)
    torch.testing.assert_close(torch.autograd.grad((logps * weights).sum(), logits), expected)
    huge = torch.tensor([[200.0, -200.0, 0.0]], dtype=torch.bfloat16).float()
    assert all(torch.isfinite(value).all() for value in _TargetLogps.apply(huge, torch.tensor([1])))
