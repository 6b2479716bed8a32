"""Metrics: summed on the device, weighted by pairs, reduced over all ranks once per log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from madpo_ray.artifacts import write_text


class Meter:
    """Sums per-pair values (B,) until `reduce` gives one number per name over all ranks.

    Names that end in `/min` or `/max` (or begin with `min_`, `max_`), and `peak_memory_bytes`, keep the extreme, all
    others the mean over pairs.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, Tensor], valid: Tensor) -> None:
        """Adds values (B,) of the pairs whose `valid` (B,) is 1. Every rank adds the same names in the same order."""
        for name, value in {"pairs": valid, **values}.items():
            value = value.detach().double()
            if kind := _extreme(name):
                sign = 1.0 if kind == "max" else -1.0
                best = torch.where(valid > 0, sign * value, -torch.inf).max()
                self._sums[name] = torch.maximum(self._sums.get(name, best), best)
            else:
                self._sums[name] = self._sums.get(name, 0.0) + (value * valid).sum()

    def merge(self, other: "Meter") -> None:
        """Takes over the sums of another meter, of the same names."""
        for name, value in other._sums.items():
            held = self._sums.get(name)
            if held is None:
                self._sums[name] = value
            else:
                self._sums[name] = torch.maximum(held, value) if _extreme(name) else held + value

    def reduce(self) -> dict[str, float]:
        """One number per name, the same on every rank, then starts anew. `pairs` is the plain sum."""
        names, vector = list(self._sums), torch.stack(list(self._sums.values()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            ranks = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, vector)
        else:
            ranks = [vector]
        everyone = torch.stack(ranks)  # (ranks, names)
        sums, largest = everyone.sum(0).tolist(), everyone.max(0).values.tolist()
        self._sums = {}
        pairs = max(sums[names.index("pairs")], 1.0)
        reduced = {}
        for i, name in enumerate(names):
            kind = _extreme(name)
            reduced[name] = (largest[i] if kind == "max" else -largest[i]) if kind else sums[i] / pairs
        return {**reduced, "pairs": sums[names.index("pairs")]}


def _extreme(name: str) -> str | None:
    if name == "peak_memory_bytes":
        return "max"
    for kind in ("min", "max"):
        if name.endswith(f"/{kind}") or name.startswith(f"{kind}_"):
            return kind
    return None


def with_effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replaces the mean of squared weights by (sum w)^2 / sum w^2, as a share of the pairs."""
    if "weight/squared" not in metrics:
        return metrics
    squared = metrics.pop("weight/squared")
    return {**metrics, "weight/effective_sample_size": metrics["weight/mean"] ** 2 / max(squared, 1e-300)}


class MetricsLog:
    """Metrics as JSON Lines and TensorBoard, one line a log, cut back to the step that a run resumes from."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a torn last line, left by a kill, is passed over."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
