"""Ranks on one machine without Ray, for benchmarks and tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from madpo_ray.data.micro_batches import MicroBatchReader
from madpo_ray.data.order import Order
from madpo_ray.training.job import TrainingJob


def join_ranks(rank: int, world_size: int, store: Path) -> None:
    """Makes this process a rank of a group on this machine; over NCCL if each has a GPU.

    Args:
        store: a file that all ranks name, and no earlier group has used.
    """
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    os.environ.update({name: str(place) for name, place in places.items()})
    options: dict[str, Any] = {"backend": "gloo"}
    if torch.cuda.device_count() >= world_size:
        torch.cuda.set_device(rank)
        options = {"backend": "nccl", "device_id": torch.device("cuda", rank)}
    dist.init_process_group(
        init_method=f"file://{store}", rank=rank, world_size=world_size, **options
    )


class LocalSite:
    """A rank that `join_ranks` made."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def micro_batches(self, start_step: int) -> Iterator[pa.Table]:
        order = Order(self._job.order_spec(self.world_size))
        reader = MicroBatchReader(order, self._job.complete)
        first = order.first_micro_batch(start_step) + self.rank
        for number in range(first, order.num_micro_batches, self.world_size):
            yield reader.read([number])

    def report(self, numbers: dict[str, float]) -> None:
        dist.barrier()

    def node_is_leaving(self) -> bool:
        return False
