"""What ZeRO shards, worked by hand: 800 parameters on 4 ranks."""

import dataclasses
from typing import Any

import pytest

from madpo_ray.config import PolicyConfig
from madpo_ray.sizing import memory as sizing_memory
from madpo_ray.sizing.footprint import Footprint
from madpo_ray.sizing.memory import RankMemory, checkpoint_bytes, rank_memory, weight_bytes

FOOTPRINT = Footprint(
    parameters=800,
    trained=400,
    largest=100,
    in_four_bits=0,
    activations=5000,
    flops=1.0,
    tokens=10,
)


def of_rank(dtype: str, num_micro_batches: int = 2, **settings: Any) -> RankMemory:
    return rank_memory(
        FOOTPRINT,
        PolicyConfig(**settings),
        dtype=dtype,
        num_ranks=4,
        num_micro_batches=num_micro_batches,
    )


def memory(dtype: str = "bfloat16", **settings: Any) -> tuple[int, ...]:
    buckets = {"reduce_bucket_size": 10, "stage3_max_live_parameters": 200}
    found = of_rank(dtype, **{**buckets, **settings})
    return (found.weights, found.optimizer, found.gradients, found.buckets, found.step, found.host)


@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        # 2 bytes of 800 weights; 12 of 400 trained ones.
        (0, "bfloat16", (1600, 4800, 800, 0, 1600, 0)),
        (0, "float32", (3200, 3200, 1600, 0, 0, 0)),
        # A quarter of the trained ones: 100.
        (1, "bfloat16", (1600, 1200, 800, 20, 400, 0)),
        (1, "float32", (3200, 1200, 1600, 40, 400, 0)),
        (2, "bfloat16", (1600, 1200, 400, 20, 400, 0)),
        (2, "float32", (3200, 1200, 400, 40, 400, 0)),
        # A quarter of all weights, and 200 that are gathered, twice on their way.
        (3, "bfloat16", (400 + 2 * 400, 1200, 400, 20, 400, 0)),
        (3, "float32", (800 + 2 * 800, 1200, 400, 40, 400, 0)),
    ],
)
def test_parts(stage: int, dtype: str, expected: tuple[int, ...]) -> None:
    assert memory(dtype, zero_stage=stage) == expected


def test_overlap_doubles_buckets() -> None:
    assert memory(zero_stage=2, overlap_comm=True)[3] == 2 * memory(zero_stage=2)[3]


def test_offloading_moves_to_the_host() -> None:
    offloaded = memory(zero_stage=3, offload_optimizer=True, offload_param=True)
    assert offloaded == (800, 0, 0, 20, 0, 1200 + 400 + 400 + 400)


def test_the_largest_tensor_is_gathered() -> None:
    assert memory(zero_stage=3, stage3_max_live_parameters=1)[0] == 400 + 2 * 2 * 100


def test_a_fetch_is_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many gathered weights, only what is fetched at a time is there twice."""
    monkeypatch.setattr(sizing_memory, "PREFETCHED", 150)
    assert memory(zero_stage=3)[0] == 400 + 2 * (200 + 150)
    monkeypatch.setattr(sizing_memory, "PREFETCHED", 50)
    assert memory(zero_stage=3)[0] == 400 + 2 * (200 + 100)  # the largest tensor


def test_four_bits_shrink_frozen_weights() -> None:
    """200 weights in 4.127 bits, and the largest tensor unpacked."""
    footprint = dataclasses.replace(FOOTPRINT, in_four_bits=200)
    assert weight_bytes(footprint, "bfloat16") == 600 * 2 + 103 + 100 * 2


def test_peak_is_the_larger_of_backward_and_step() -> None:
    """With one micro-batch a step, gradients come while activations go."""
    held = 1600 + 4800
    assert of_rank("bfloat16", zero_stage=0).peak == held + 800 + 5000
    assert of_rank("bfloat16", num_micro_batches=1, zero_stage=0).peak == held + 5000
    small = dataclasses.replace(of_rank("bfloat16", zero_stage=0), activations=10)
    assert small.peak == held + 800 + 1600


def test_checkpoint_has_weights_copies_and_moments() -> None:
    assert checkpoint_bytes(FOOTPRINT, dtype="bfloat16", zero_stage=0) == 400 * (2 + 4 + 8)
    assert checkpoint_bytes(FOOTPRINT, dtype="float32", zero_stage=2) == 400 * (4 + 4 + 8)
    for dtype in ("float32", "bfloat16"):
        assert checkpoint_bytes(FOOTPRINT, dtype=dtype, zero_stage=3) == 400 * (4 + 8)
