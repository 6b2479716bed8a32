"""Sums, maxima and gathers over all ranks, and how long they wait.

Without a process group there is one rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of every rank's value, on every rank, in float64."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return float(total)


def max_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of every rank's values, one by one, on every rank."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [float(value) for value in largest]


def largest_over_ranks(value: float, device: torch.device) -> float:
    """The largest of every rank's value, on every rank."""
    return max_over_ranks([value], device)[0]


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor, of one shape, on every rank, in their order."""
    if world_size() == 1:
        return [tensor]
    ranks = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(ranks, tensor)
    return ranks


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in their order."""
    if world_size() == 1:
        return [value]
    ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def gather_valid(values: Tensor, valid: Tensor) -> tuple[Tensor, slice]:
    """The valid values of all ranks, (n,), in the order of ranks, and where this rank's own are.

    Args:
        values: (B,), on any device.
        valid: (B,) bool.
    """
    own = values[valid].cpu()
    ranks = gather_objects(own)
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = sum(len(part) for part in ranks[:rank])
    return torch.cat(ranks), slice(start, start + len(own))


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def take_over_timeout(group: dist.ProcessGroup, device: torch.device) -> None:
    """Gives a new group, which has its backend's default, the time-out of the world.

    Args:
        device: whose backend waits.
    """
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(device).options._timeout
    dist.distributed_c10d._set_pg_timeout(timeout, group)
