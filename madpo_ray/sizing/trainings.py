"""What one training needs on given GPUs, and the first settings that fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from madpo_ray.config import Config, TrainingConfig
from madpo_ray.models.loading import TaskType
from madpo_ray.models.trainable import check_architecture
from madpo_ray.sizing.footprint import (
    Footprint,
    Lengths,
    Shape,
    measure_footprint,
    reads_packed_rows,
)
from madpo_ray.sizing.gpus import Cluster
from madpo_ray.sizing.memory import MASTER, RankMemory, checkpoint_bytes, rank_memory
from madpo_ray.training.schedule import count_turns

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# An allowance for the libraries of a process, with CUDA's.
PROCESS_BYTES = 2 * 2**30

# What is tried in turn: first more sharding, then recomputation, then the host's memory. Only then
# fewer pairs per forward.
LADDER: tuple[dict[str, Any], ...] = (
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 2, "gradient_checkpointing": True},
    {"zero_stage": 3, "gradient_checkpointing": True},
    {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True},
    {
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "offload_optimizer": True,
        "offload_param": True,
    },
)
_ALL_OFF = {
    "gradient_checkpointing": False,
    "offload_optimizer": False,
    "offload_param": False,
}


class Training(NamedTuple):
    """A training of a config."""

    stage: str
    settings: TrainingConfig
    task_type: TaskType
    responses: tuple[str, ...]
    times: int  # how often it trains
    is_merged: bool  # whether rank 0 loads the model again, to merge LoRA


@dataclass(frozen=True)
class SizedSettings:
    """Settings, and what they need."""

    changes: Mapping[str, Any]  # keys that differ from the section of the training
    memory: RankMemory
    host: int  # bytes per node


@dataclass(frozen=True)
class TrainingNeeds:
    """What a training needs."""

    stage: str
    shape: Shape
    footprint: Footprint
    configured: SizedSettings
    by_zero_stage: Mapping[int, RankMemory]
    recomputed: Mapping[int, RankMemory]  # the same with gradient_checkpointing
    fitting: SizedSettings | None  # the first settings that fit; None if none do
    checkpoint: int  # bytes, over all ranks, with the first settings that fit
    pairs_per_second: float
    times: int  # how often it trains
    idle: float  # share of the GPUs' time for which a step has no micro-batches


class _Sizer:
    """Measures one training with different settings; each footprint once."""

    def __init__(
        self,
        training: Training,
        config: Config,
        architecture: "PretrainedConfig",
        cluster: Cluster,
        lengths: Lengths,
    ) -> None:
        self._training = training
        self._model = config.model
        self._architecture = architecture
        self._cluster = cluster
        self._lengths = lengths
        self._packed = reads_packed_rows(architecture, config.model)
        self._footprints: dict[tuple[int, bool], Footprint] = {}
        self.shape = lengths.shape(
            training.settings.per_device_train_batch_size,
            training.settings.max_tokens_per_device,
            packed=self._packed,
            num_responses=len(training.responses),
            max_pairs=training.settings.global_batch_size,
        )

    def footprint(self, num_pairs: int, is_recomputed: bool) -> Footprint:
        key = (num_pairs, is_recomputed)
        if key not in self._footprints:
            changes = {"gradient_checkpointing": is_recomputed}
            self._footprints[key] = measure_footprint(
                self._architecture,
                self._model,
                self.shape._replace(pairs=num_pairs),
                task_type=self._training.task_type,
                settings=self._training.settings.model_copy(update=changes),
                packed=self._packed,
                responses=self._training.responses,
            )
        return self._footprints[key]

    def memory(self, changes: Mapping[str, Any], num_pairs: int | None = None) -> RankMemory:
        """Of a rank, with these changes to the settings."""
        settings = self._training.settings.model_copy(update=dict(changes))
        num_pairs = num_pairs or self.shape.pairs
        num_ranks = self._cluster.num_gpus
        return rank_memory(
            self.footprint(num_pairs, settings.gradient_checkpointing),
            settings,
            dtype=self._model.dtype,
            num_ranks=num_ranks,
            num_micro_batches=math.ceil(settings.global_batch_size / num_pairs / num_ranks),
        )

    def by_zero_stage(self, *, is_recomputed: bool) -> dict[int, RankMemory]:
        """Under each stage of ZeRO, without offloading."""
        changes = {**_ALL_OFF, "gradient_checkpointing": is_recomputed}
        return {stage: self.memory({**changes, "zero_stage": stage}) for stage in range(4)}

    def first_that_fits(self) -> SizedSettings | None:
        """The first of the ladder's settings, with as many pairs per forward as possible."""
        # ZeRO-3 cannot shard 4-bit weights, and gathers weights inside layers, as compiled ones
        # must not.
        is_compiled = self._model.torch_compile
        most = 2 if self._model.load_in_4bit or is_compiled else 3
        ladder = [changes for changes in LADDER if changes["zero_stage"] <= most]
        if is_compiled:
            ladder = [changes for changes in ladder if "gradient_checkpointing" not in changes]
        num_pairs = self.shape.pairs
        while num_pairs:
            for changes in ladder:
                settings = {**_ALL_OFF, **changes}
                memory = self.memory(settings, num_pairs)
                if memory.peak <= self._cluster.limit:
                    return self.choice({**settings, **self._batch_setting(num_pairs)}, memory)
            num_pairs //= 2
        return None

    def _batch_setting(self, num_pairs: int) -> dict[str, int]:
        if self._training.settings.max_tokens_per_device is None:
            return {"per_device_train_batch_size": num_pairs}
        tokens = self._lengths.tokens_of_pair(len(self._training.responses), packed=self._packed)
        return {"max_tokens_per_device": num_pairs * tokens}

    def choice(self, settings: Mapping[str, Any], memory: RankMemory) -> SizedSettings:
        current = self._training.settings
        changes = {key: value for key, value in settings.items() if getattr(current, key) != value}
        host = self._cluster.gpus_per_node * (memory.host + PROCESS_BYTES)
        if self._training.is_merged:
            host += self.footprint(self.shape.pairs, False).parameters * MASTER
        return SizedSettings(changes, memory, host)


def training_needs(
    training: Training,
    config: Config,
    architecture: "PretrainedConfig",
    cluster: Cluster,
    lengths: Lengths,
) -> TrainingNeeds:
    """What a training needs. Raises UserError if its settings do not suit the model."""
    check_architecture(architecture, config.model, training.settings, task_type=training.task_type)
    sizer = _Sizer(training, config, architecture, cluster, lengths)
    dtype = config.model.dtype
    settings = training.settings
    shape = sizer.shape
    footprint = sizer.footprint(shape.pairs, settings.gradient_checkpointing)
    # Some GPUs are idle if a step has too few micro-batches.
    busy, turns = count_turns(settings.global_batch_size, shape.pairs, cluster.num_gpus)
    micro_batches_per_second = cluster.speed(dtype) / footprint.flops * busy / turns
    fitting = sizer.first_that_fits()
    stage = settings.zero_stage
    if fitting is not None:
        stage = fitting.changes.get("zero_stage", stage)
    return TrainingNeeds(
        stage=training.stage,
        shape=shape,
        footprint=footprint,
        configured=sizer.choice({}, sizer.memory({})),
        by_zero_stage=sizer.by_zero_stage(is_recomputed=False),
        recomputed=sizer.by_zero_stage(is_recomputed=True),
        fitting=fitting,
        checkpoint=checkpoint_bytes(footprint, dtype=dtype, zero_stage=stage),
        times=training.times,
        idle=1 - busy / turns,
        pairs_per_second=shape.pairs * micro_batches_per_second,
    )
