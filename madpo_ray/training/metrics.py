"""Metrics: summed on the device, reduced over all ranks once per log, written by rank 0.

Legend: B pairs of a micro-batch, C components that a reduction needs to add up.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from madpo_ray.atomic import write_text
from madpo_ray.training.collectives import gather_tensors

logger = logging.getLogger(__name__)

Reduction = Literal[
    "mean",  # over pairs
    "sum",
    "min",
    "max",
    "effective_share",  # (sum v)^2 / (n sum v^2): Kish's effective sample size, as a share of n
]


class Metric(NamedTuple):
    """A value of each pair, and how those of all pairs become one number."""

    values: Tensor  # (B,)
    reduction: Reduction = "mean"


def means(values: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Metrics that are averaged over pairs."""
    return {name: Metric(value) for name, value in values.items()}


class Meter:
    """Adds up metrics until `reduce` gives one number per name over all ranks."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}  # name -> (C,)
        self._reductions: dict[str, Reduction] = {}

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, metrics: Mapping[str, Metric], valid: Tensor) -> None:
        """Adds the pairs whose `valid` (B,) is 1.

        Every rank adds the same names in the same order.
        """
        self._merge("pairs", "sum", _components(Metric(valid, "sum"), valid))
        for name, metric in metrics.items():
            self._merge(name, metric.reduction, _components(metric, valid))

    def merge(self, other: "Meter") -> None:
        """Adds what another meter holds."""
        for name, part in other._parts.items():
            self._merge(name, other._reductions[name], part)

    def _merge(self, name: str, reduction: Reduction, part: Tensor) -> None:
        self._reductions[name] = reduction
        held = self._parts.get(name)
        self._parts[name] = part if held is None else _combine(reduction, [held, part])

    def reduce(self) -> dict[str, float]:
        """One number per name, the same on every rank. Empties the meter."""
        sizes = [len(part) for part in self._parts.values()]
        ranks = gather_tensors(torch.cat(list(self._parts.values())))
        by_rank = [torch.split(vector, sizes) for vector in ranks]

        totals = {}
        for i, name in enumerate(self._parts):
            combined = _combine(self._reductions[name], [parts[i] for parts in by_rank])
            totals[name] = combined.tolist()
        self._parts = {}

        count = max(totals["pairs"][0], 1.0)
        return {
            name: _finish(self._reductions[name], components, count)
            for name, components in totals.items()
        }


def _components(metric: Metric, valid: Tensor) -> Tensor:
    """What has to be kept of a micro-batch's values, (C,)."""
    value = metric.values.detach().double()
    match metric.reduction:
        case "max":
            return torch.where(valid > 0, value, -torch.inf).max()[None]
        case "min":
            return torch.where(valid > 0, value, torch.inf).min()[None]
        case "effective_share":
            return torch.stack([(value * valid).sum(), (value**2 * valid).sum()])
    return (value * valid).sum()[None]


def _combine(reduction: Reduction, parts: list[Tensor]) -> Tensor:
    stacked = torch.stack(parts)
    match reduction:
        case "max":
            return stacked.amax(0)
        case "min":
            return stacked.amin(0)
    return stacked.sum(0)


def _finish(reduction: Reduction, components: list[float], count: float) -> float:
    match reduction:
        case "mean":
            return components[0] / count
        case "effective_share":
            total, squares = components
            return total**2 / max(count * squares, 1e-300)
    return components[0]


METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Metrics as JSON Lines and TensorBoard. A resumed run continues after its step."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds; only rank 0 writes

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
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
    """The lines of a metrics file.

    A last line without its newline, as a kill leaves it, is skipped. Other lines that cannot be
    read are skipped with a warning.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = text.splitlines(keepends=True)
    parsed = [_parse_line(line) for line in lines if line.endswith("\n")]
    kept = [line for line in parsed if line is not None]
    if len(kept) < len(parsed):
        logger.warning("%s: %d lines cannot be read", path, len(parsed) - len(kept))
    return kept


def evaluation_of(metrics: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The line of a step's evaluation; None if there is none."""
    lines = (line for line in metrics if line["step"] == step and "eval_loss" in line)
    return next(lines, None)


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if is_line else None


def last_with(lines: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The last line that holds a metric."""
    return next((line for line in reversed(list(lines)) if name in line), None)
