"""Tasks of the tests: they record, spoil or check what happens inside a rank.

In a module of their own, since the ranks' processes import them by name.
"""

import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from madpo_ray.config import PolicyConfig
from madpo_ray.data.batching import MicroBatch
from madpo_ray.models.flops import ModelFlops
from madpo_ray.training.job import PolicyTask, TrainingJob
from madpo_ray.training.objectives import PolicyObjective
from madpo_ray.training.protocols import Objective, Terms


def _settings(job: TrainingJob) -> PolicyConfig:
    assert isinstance(job.settings, PolicyConfig)
    return job.settings


class _Recording(PolicyObjective):
    def __init__(self, job: TrainingJob, record: Path) -> None:
        super().__init__(_settings(job), job.seed)
        self._record = record / f"{os.getpid()}.jsonl"

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        if training:
            with self._record.open("a") as stream:
                stream.write(json.dumps([batch.place.step, batch.pair_ids]) + "\n")
        return super().__call__(outputs, batch, training=training)


@dataclass(frozen=True)
class RecordingTask(PolicyTask):
    """Writes down which pairs each process read in which step of training."""

    record: Path = field(default_factory=Path)

    def objective(self, job: TrainingJob) -> Objective:
        return _Recording(job, self.record)


@dataclass(frozen=True)
class SeedTask(PolicyTask):
    """Writes down the seed that each process trains with."""

    record: Path = field(default_factory=Path)

    def objective(self, job: TrainingJob) -> Objective:
        (self.record / f"{os.getpid()}").write_text(str(torch.initial_seed()))
        return super().objective(job)


class FrozenNormTask(PolicyTask):
    """Trains everything but the last norm."""

    def load(self, job: TrainingJob, max_response_tokens: int) -> torch.nn.Module:
        module: Any = super().load(job, max_response_tokens)
        module.model.model.norm.requires_grad_(False)
        return module  # type: ignore[no-any-return]


class OneModelTask(PolicyTask):
    """Fails if a rank ever holds two models."""

    loaded: ClassVar[list[weakref.ref[torch.nn.Module]]] = []

    def load(self, job: TrainingJob, max_response_tokens: int) -> torch.nn.Module:
        assert all(module() is None for module in self.loaded)
        module = super().load(job, max_response_tokens)
        self.loaded.append(weakref.ref(module))
        return module


class PartitionedTask(PolicyTask):
    """Fails unless the parameters are sharded, already before DeepSpeed starts."""

    def load(self, job: TrainingJob, max_response_tokens: int) -> torch.nn.Module:
        module: Any = super().load(job, max_response_tokens)
        parameters = list(module.parameters())
        assert all(parameter.numel() == 0 for parameter in parameters)
        held = sum(parameter.ds_tensor.numel() for parameter in parameters)
        assert held <= 0.51 * sum(parameter.ds_numel for parameter in parameters)

        linear = [p.ds_numel for name, p in module.named_parameters() if "_proj" in name]
        assert ModelFlops(module.model).per_token == 6 * sum(linear)
        return module  # type: ignore[no-any-return]


class _Poisoned(PolicyObjective):
    def __init__(self, job: TrainingJob, poison: str) -> None:
        super().__init__(_settings(job), job.seed)
        self._poison = poison

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        is_target = training and batch.place.step == 1 and dist.get_rank() == 0
        if is_target and self._poison == "logps":
            outputs = {**outputs, "logps": outputs["logps"] * torch.inf}
        terms = super().__call__(outputs, batch, training=training)
        if is_target and self._poison == "loss":
            return Terms(terms.loss * torch.inf, terms.metrics)
        if is_target and self._poison == "gradient":  # of the square root at 0
            return Terms(terms.loss + (terms.loss - terms.loss.detach()).sqrt(), terms.metrics)
        return terms


@dataclass(frozen=True)
class PoisonedTask(PolicyTask):
    """Spoils rank 0's loss, or only its gradient, or its log-probs, in the second step."""

    poison: str = ""

    def objective(self, job: TrainingJob) -> Objective:
        return _Poisoned(job, self.poison)
