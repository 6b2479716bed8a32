"""Collectives on one process and on two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from madpo_ray.training.collectives import (
    broadcast_object,
    gather_objects,
    gather_tensors,
    gather_valid,
    max_over_ranks,
    sum_over_ranks,
    world_size,
)


def test_without_a_group_there_is_one_rank() -> None:
    assert world_size() == 1
    assert gather_objects("a") == ["a"]
    assert broadcast_object("a") == "a"
    assert sum_over_ranks(2.0, torch.device("cpu")) == 2.0
    assert max_over_ranks([1.0, -2.0], torch.device("cpu")) == [1.0, -2.0]
    (gathered,) = gather_tensors(torch.ones(2))
    assert gathered.tolist() == [1.0, 1.0]
    values, own = gather_valid(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    assert values.tolist() == [1.0, 3.0]
    assert own == slice(0, 2)


def _gathers(rank: int, store: str, results: "torch.multiprocessing.Queue[object]") -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    cpu = torch.device("cpu")
    valid = torch.tensor([True, rank == 1])
    values, own = gather_valid(torch.tensor([1.0, 2.0]) + 10 * rank, valid)
    results.put(
        (
            rank,
            sum_over_ranks(rank + 1.0, cpu),
            max_over_ranks([rank, -rank], cpu),
            gather_objects(rank),
            broadcast_object(f"from {rank}"),
            values.tolist(),
            (own.start, own.stop),
        )
    )
    dist.destroy_process_group()


@pytest.mark.deepspeed
def test_on_two_ranks(tmp_path: Path) -> None:
    """In the order of ranks; each knows where its own values are."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    store = str(tmp_path / "store")
    processes = [context.Process(target=_gathers, args=(rank, store, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    by_rank = dict(sorted((first, rest) for first, *rest in [results.get(), results.get()]))
    for process in processes:
        process.join()
    shared = [3.0, [1.0, 0.0], [0, 1], "from 0", [1.0, 11.0, 12.0]]
    assert by_rank == {0: [*shared, (0, 1)], 1: [*shared, (1, 3)]}
