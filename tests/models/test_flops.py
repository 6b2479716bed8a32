"""Model FLOPs against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from madpo_ray.config import PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.models.flops import ModelFlops, peak_flops, peak_memory_bytes
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.models.preparing import prepare_for_training
from support.models import make_model

PAIR = {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [12, 13]}

# With LoRA the first layer's k and v come after q, which is trained, so they count as passing a
# gradient on: that of their input, which nobody asks for (two weights and two LoRA matrices, 9
# tokens).
NOT_NEEDED = 2 * 9 * 2 * (32 * 16 + 4 * 32)


@pytest.mark.parametrize(
    ("settings", "more"), [({}, 0), ({"use_peft": True, "lora_r": 4}, NOT_NEEDED)]
)
def test_counts_the_products_that_run(settings: dict[str, object], more: int) -> None:
    model = prepare_for_training(make_model(), PolicyConfig(**settings), task_type="CAUSAL_LM")
    batch = collate([PAIR], packed=True)
    with FlopCounterMode(display=False) as counter:
        ResponseLogps(model)(batch)["logps"].sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    counted = sum(count for name, count in by_operation.items() if "mm" in str(name))

    # Response tokens, hidden size, vocabulary: the head's forward, once more.
    recomputed = 2 * 5 * 32 * 400
    # Two layers of 32 channels, over 10 + 4 * 3 + 6 + 4 * 2 + 3 pairs of tokens.
    attention = 2 * 3 * 4 * 32 * 39
    assert ModelFlops(model)(batch) == counted - recomputed + attention + more


def test_counts_the_experts_of_a_token() -> None:
    model = make_model("qwen3_moe")
    config = model.config
    experts = [one for name, one in model.named_parameters() if one.ndim == 3]
    per_token = sum(one[0].numel() for one in experts) * config.num_experts_per_tok
    assert per_token > 0
    found = ModelFlops(model).per_token
    for one in experts:
        one.requires_grad_(False)
    # Two products less: the gradients of the weights.
    assert found - ModelFlops(model).per_token == 2 * per_token


def test_layers_may_differ() -> None:
    assert ModelFlops(make_model("gemma4_text", vocab_size_per_layer_input=400)).per_attended > 0


def test_measures_at_least_one_product() -> None:
    flops = peak_flops(torch.float32, torch.device("cpu"), size=64, seconds=0.0)
    assert 1e6 < flops < float("inf")


def test_process_has_a_peak_memory() -> None:
    assert peak_memory_bytes() > 2**20
