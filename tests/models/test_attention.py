"""Which models may read packed rows, and that such rows equal separate forwards."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig

from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.data.batching import PackedRow, collate
from madpo_ray.models.attention import (
    PACKED,
    _RepeatPrompts,
    may_pack,
    packed_attention,
    use_attention,
)
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.models.preparing import prepare_for_training
from support.forwards import PAIRS, separate_logps
from support.models import ARCHITECTURES, make_model, tiny_config

SINGLE_TOKENS = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
# Keys that turn a window on. It is shorter than the rows of PAIRS.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mixtral": {},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "phi3": {},
    "starcoder2": {},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
}


def settings(**changes: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path="x", **changes)


def require_equal(model: Any, *, checkpointing: bool = False) -> None:
    """Packed log-probs are those of separate forwards to 1e-4, gradients to 1e-5 relative."""
    expected = separate_logps(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, len(expected))
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)

    if checkpointing:
        training = PolicyConfig(gradient_checkpointing=True)
        prepare_for_training(model, training, task_type="CAUSAL_LM").train()
    logps = ResponseLogps(model)(collate(PAIRS, packed=True))["logps"]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
    ours = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None and their is not None:
            # The gradient of a bias of keys is 0 but for rounding.
            assert (our - their).norm() <= 1e-5 * their.norm() + 1e-6


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_rows_equal_separate_forwards(model_type: str) -> None:
    require_equal(make_model(model_type))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("model_type", list(WINDOWS))
def test_windows_are_kept(model_type: str, window: int, checkpointing: bool) -> None:
    changes = WINDOWS[model_type]
    model = make_model(model_type, sliding_window=window, **changes)
    wide = make_model(model_type, sliding_window=4096, **changes)
    with torch.no_grad():  # else a window that is dropped would not show
        assert (separate_logps(model) - separate_logps(wide)).abs().max() > 1e-2
    require_equal(model, checkpointing=checkpointing)


def test_rows_of_single_tokens() -> None:
    """Prompts and responses of one token, alone and beside others."""
    model = make_model()
    module = ResponseLogps(model)
    with torch.no_grad():
        alone = module(collate([SINGLE_TOKENS], packed=True))["logps"]
        mixed = module(collate([*PAIRS, SINGLE_TOKENS, *PAIRS], packed=True))["logps"]
        use_attention(model, packed=False)
        expected = [
            model(input_ids=torch.tensor([[5, response]])).logits[0, 0].log_softmax(-1)[response]
            for response in (6, 7)
        ]
    torch.testing.assert_close(alone, torch.stack(expected), rtol=0, atol=1e-5)
    own = mixed[[len(PAIRS), 3 * len(PAIRS) + 1]]
    torch.testing.assert_close(own, alone, rtol=0, atol=1e-5)


def test_single_responses_are_packed() -> None:
    model = make_model()
    with torch.no_grad():
        batch = collate(PAIRS, packed=True, responses=["chosen_ids"])
        logps = ResponseLogps(model)(batch)["logps"]
        expected = separate_logps(model)[: len(PAIRS)]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)


def test_attention_dropout_is_applied() -> None:
    row = collate(PAIRS, packed=True).packed_row
    assert row is not None
    query, key, value = random_states(row, torch.float32)
    plain, _ = packed_attention(None, query, key, value, None, packed_row=row)
    torch.manual_seed(0)
    dropped, _ = packed_attention(None, query, key, value, None, packed_row=row, dropout=0.5)
    assert not torch.allclose(plain, dropped)
    mean = torch.stack(
        [
            packed_attention(None, query, key, value, None, packed_row=row, dropout=0.5)[0]
            for _ in range(2000)
        ]
    ).mean(0)
    assert (mean - plain).abs().max() < 0.3


def random_states(row: PackedRow, dtype: torch.dtype) -> list[Tensor]:
    """Query (1, 4, T, 8), key and value (1, 2, T, 8)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, row.segments[-1].end, 8) for heads in (4, 2, 2)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def test_prompts_are_repeated_for_each_segment() -> None:
    """What the kernel for GPUs reads, and its gradient."""
    batch = collate([*PAIRS, SINGLE_TOKENS], packed=True)
    row = batch.packed_row
    assert row is not None
    states = [torch.randn(batch.input_ids.shape[1], 2, 4, requires_grad=True) for _ in range(2)]
    repeated = _RepeatPrompts.apply(*states, row)  # type: ignore[no-untyped-call]
    expected = [
        torch.cat([part for one in row.segments for part in (each[one.prefix], each[one.own])])
        for each in states
    ]
    grads = [torch.randn_like(each) for each in expected]
    torch.testing.assert_close(list(repeated), expected, rtol=0, atol=0)
    ours, theirs = (torch.autograd.grad(one, states, grads) for one in (repeated, expected))
    torch.testing.assert_close(ours, theirs)

    # Where the kernel finds the segments.
    lengths = [(one.num_tokens, one.num_keys) for one in row.segments]
    ends = zip(row.query_ends.diff().tolist(), row.key_ends.diff().tolist(), strict=True)
    assert list(ends) == lengths
    assert (row.max_queries, row.max_keys) == tuple(map(max, zip(*lengths, strict=True)))
    assert row.query_ends.dtype == row.key_ends.dtype == torch.int32


def test_attention_goes_back_to_the_models_own() -> None:
    model = make_model()
    before = separate_logps(model)
    use_attention(model, packed=True)
    with pytest.raises(RuntimeError, match="do not hand packed_row over"):
        model(input_ids=torch.tensor([[5, 6]]))
    use_attention(model, packed=False)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(separate_logps(model), before)


def test_a_model_that_was_packed_is_so_in_another_process() -> None:
    """Where the attention has not been registered: transformers keeps a table per process."""
    model = make_model()
    use_attention(model, packed=True)
    AttentionInterface._global_mapping.pop(PACKED)
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        logps = ResponseLogps(copied)(collate(PAIRS, packed=True))["logps"]
        torch.testing.assert_close(logps, separate_logps(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unknown_tensors_are_refused(dtype: torch.dtype) -> None:
    """Attention sinks, which would hardly show in bfloat16; also if they are weak."""
    model = make_model("gpt_oss", attention="eager").to(dtype)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, -3.0)
    with pytest.raises(RuntimeError, match="attention also reads s_aux"):
        ResponseLogps(model)(collate(PAIRS, packed=True))


def test_linear_attention_is_never_packed() -> None:
    assert not may_pack(settings(), tiny_config("qwen3_next"))


def test_packing_can_be_turned_off() -> None:
    assert may_pack(settings(), tiny_config("llama"))
    assert not may_pack(settings(packed_rows="off"), tiny_config("llama"))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
        ("llama4_text", {}),  # chunks of attention
        ("llama4", {}),  # the same, in the config of its text part
        ("deepseek_v32", {}),  # the few tokens that an indexer picks
    ],
)
def test_limits_that_are_not_known_are_not_packed(model_type: str, changes: dict[str, Any]) -> None:
    """Short pairs would not show them."""
    assert not may_pack(settings(), AutoConfig.for_model(model_type, **changes))
