"""Which models may read a pair as one row, and that such rows equal two separate forwards."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.models.attention import may_share_prefix
from madpo_ray.models.loading import prepare_for_training
from madpo_ray.models.logprobs import ResponseLogps
from support.forwards import PAIRS, separate_logps
from support.models import make_model, tiny_config

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gemma": ("gemma", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    # Windows shorter than the rows.
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma2, window": ("gemma2", {"sliding_window": 8}),
    "gemma3, window": (
        "gemma3_text",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
EAGER = [(name, "eager") for name in MODELS]
SDPA = [(name, "sdpa") for name in MODELS if not name.startswith("gemma2")]  # Gemma 2 has none


def settings(attention: str = "sdpa", **changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path="x", attn_implementation=attention, **changes)


@pytest.mark.parametrize(("name", "attention"), [*EAGER, *SDPA])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_rows_equal_separate_forwards(
    name: str, attention: str, checkpointing: bool
) -> None:
    """Log-probs to 1e-4, gradients to 1e-5 relative."""
    model_type, changes = MODELS[name]
    model = make_model(model_type, **changes)
    model.set_attn_implementation(attention)
    assert may_share_prefix(settings(attention), model.config)
    expected = separate_logps(model)
    if checkpointing:
        training = PolicyConfig(gradient_checkpointing=True)
        prepare_for_training(model, training, task_type="CAUSAL_LM").train()
    outputs = ResponseLogps(model)(collate(PAIRS, shared_prefix=True))
    torch.testing.assert_close(outputs["logps"], expected, rtol=0, atol=1e-4)

    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, len(expected))
    ours = torch.autograd.grad((outputs["logps"] * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None and their is not None:
            assert (our - their).norm() <= 1e-5 * their.norm() + 1e-7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's, when it compiles
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])  # it has none
def test_flex_attention_equals_separate_forwards(name: str) -> None:
    """Forward only: its gradients are for GPUs."""
    model_type, changes = MODELS[name]
    model = make_model(model_type, **changes)
    expected = separate_logps(model)
    model.set_attn_implementation("flex_attention")
    assert may_share_prefix(settings("flex_attention"), model.config)
    with torch.no_grad():
        outputs = ResponseLogps(model)(collate(PAIRS, shared_prefix=True))
    torch.testing.assert_close(outputs["logps"], expected, rtol=0, atol=1e-4)


def test_windows_matter() -> None:
    """Else the tests above could not see a window that a mask drops."""
    narrow = make_model("mistral", sliding_window=8)
    wide = make_model("mistral", sliding_window=None)
    assert (separate_logps(narrow) - separate_logps(wide)).abs().max() > 1e-2


def test_linear_attention_never_shares() -> None:
    assert not may_share_prefix(settings(), tiny_config("qwen3_next"))


def test_sharing_can_be_turned_off() -> None:
    assert may_share_prefix(settings(), tiny_config("llama"))
    assert not may_share_prefix(settings(shared_prefix="off"), tiny_config("llama"))
    assert not may_share_prefix(settings("flash_attention_2"), tiny_config("llama"))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
        ("llama4_text", {}),  # chunks of attention
        ("llama4", {}),  # the same, in the config of its text part
        ("deepseek_v32", {}),  # the few tokens that an indexer picks
    ],
)
def test_limits_that_no_mask_here_knows_are_not_shared(
    model_type: str, changes: dict[str, Any]
) -> None:
    """Short pairs would not show them."""
    assert not may_share_prefix(settings("eager"), AutoConfig.for_model(model_type, **changes))
