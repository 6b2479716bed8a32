"""Model FLOPs against what torch counts."""

import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode

from madpo_ray.batching import collate
from madpo_ray.config import PolicyConfig
from madpo_ray.logprobs import PairLogps
from madpo_ray.models import prepare_for_training
from madpo_ray.throughput import ModelFlops, peak_flops, peak_memory_bytes

ROW = {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [12, 13]}


# With LoRA the first layer's k and v come after q, which is trained, and so are taken to pass a gradient on: their
# input's, which nobody asks for (two weights and two LoRA matrices, 9 tokens).
UNASKED = 2 * 9 * 2 * (32 * 16 + 4 * 32)


@pytest.mark.parametrize(("settings", "more"), [({}, 0), ({"use_peft": True, "lora_r": 4}, UNASKED)])
def test_products_of_linear_layers_are_those_that_run(settings: dict[str, object], more: int) -> None:
    model = prepare_for_training(make_model(), PolicyConfig(**settings), task_type="CAUSAL_LM")
    batch = collate([ROW], shared_prefix=True)
    with FlopCounterMode(display=False) as counter:
        PairLogps(model)(batch)["logps"].sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    recomputed = 2 * 5 * 32 * 400  # response tokens, hidden size, vocabulary: the head's forward, once more
    # Attention: two layers of 32 channels, over the 10 + 4 * 3 + 6 + 4 * 2 + 3 pairs of tokens that see each other.
    attention = 2 * 3 * 4 * 32 * 39
    assert ModelFlops(model)(batch) == counted - recomputed + attention + more


def test_the_machine_has_a_peak_and_the_process_a_size() -> None:
    assert peak_flops(torch.float32, torch.device("cpu"), size=64, seconds=0.01) > 1e6
    assert peak_memory_bytes() > 2**20
