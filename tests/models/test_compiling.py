"""Compiled layers give the numbers of the others, and are compiled once for rows of any length."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from madpo_ray.config import ModelConfig, PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.errors import UserError
from madpo_ray.models.attention import PACKED, packed_attention
from madpo_ray.models.compiling import compile_layers
from madpo_ray.models.loading import transformer_of
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.models.reading import find_reading
from support.forwards import PAIRS
from support.models import make_model


@pytest.fixture(autouse=True)
def restored_attention() -> Iterator[None]:
    yield
    AttentionInterface.register(PACKED, packed_attention)


def numbers_of(module: ResponseLogps, pairs: list[dict[str, Any]]) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and gradients of a weighted sum of them."""
    logps = module(collate(pairs, packed=True))["logps"]
    parameters = [one for one in module.parameters() if one.requires_grad]
    weights = torch.linspace(-1, 1, len(logps))
    return logps.detach(), list(torch.autograd.grad((logps * weights).sum(), parameters))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler reads it
@pytest.mark.parametrize(
    ("model_type", "settings"), [("llama", {"use_peft": True}), ("gemma3_text", {})]
)
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_same_numbers_for_rows_of_any_length(model_type: str, settings: dict[str, Any]) -> None:
    torch.compiler.reset()
    counters.clear()
    training = PolicyConfig(**settings)
    model = make_model(model_type)
    model = prepare_for_training(model, training, task_type="CAUSAL_LM").train()
    eager = ResponseLogps(copy.deepcopy(model))
    compiled = ResponseLogps(model)
    model_config = ModelConfig(model_name_or_path="x", torch_compile=True)
    reading = find_reading(compiled, torch.device("cpu"), model_config)
    assert reading.packed
    compiled.train()

    graphs = []
    for pairs in (PAIRS, PAIRS[:1], PAIRS + PAIRS, PAIRS[::-1]):
        ours, theirs = (numbers_of(module, list(pairs)) for module in (compiled, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:-1]


def test_needs_layers_of_transformers() -> None:
    with pytest.raises(UserError, match="Linear has no layers"):
        compile_layers(nn.Linear(2, 2))


def test_finds_all_layers() -> None:
    model = make_model()
    compile_layers(transformer_of(model))
    layers: Any = model.get_decoder().layers
    assert all(layer._compiled_call_impl for layer in layers)
