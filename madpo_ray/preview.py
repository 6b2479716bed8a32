"""What a run would do, without a model or a cluster: rows, steps, workers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from madpo_ray import columns
from madpo_ray.artifacts.manifest import read_manifest
from madpo_ray.config import Config, TrainingConfig
from madpo_ray.data.order import count_steps
from madpo_ray.data.sources import bound_rows, list_files
from madpo_ray.pipeline import check
from madpo_ray.search.space import count_trials, trials_at_a_time
from madpo_ray.stages import pairs, reward, sft, train, tune
from madpo_ray.stages.stage import Stage
from madpo_ray.training.schedule import count_turns


@dataclass(frozen=True)
class TrainingPreview:
    """One training of a run."""

    stage: str
    steps: int
    idle: str  # what part of a step keeps no worker busy, in words


@dataclass(frozen=True)
class Preview:
    """What a command would do."""

    rows: dict[str, int]  # by file
    pairs: dict[str, int] | None  # by split; None until stage pairs is done
    trainings: list[TrainingPreview] = field(default_factory=list)
    workers: str = ""
    trials: str = ""
    stages: list[str] = field(default_factory=list)  # to do
    needed: list[str] = field(default_factory=list)  # to do before those

    def lines(self) -> Iterator[str]:
        """The preview for a terminal."""
        for file, count in self.rows.items():
            yield f"rows, at most: {count} in {file}"
        if self.pairs is None:
            yield "pairs: known after stage pairs; the steps are estimates from the rows"
        else:
            yield "pairs: " + ", ".join(f"{count} {split}" for split, count in self.pairs.items())
        for training in self.trainings:
            yield f"steps of {training.stage}: {training.steps}"
            if training.idle:
                yield f"idle in {training.stage}: {training.idle}"
        yield f"workers: {self.workers}"
        if self.trials:
            yield f"trials: {self.trials}"
        yield f"stages to do: {', '.join(self.stages) or 'none'}"
        if self.needed:
            yield f"needed before: {', '.join(self.needed)} (or use madpo-ray run)"


def preview(config: Config, stages: Sequence[Stage]) -> Preview:
    """What running these stages would do.

    Raises UserError as the stages themselves would.
    """
    check(config, stages)
    rows = {file: bound_rows(file) for file in list_files(config.data.files)}
    counts = _pairs_by_split(config)
    num_pairs = counts[columns.TRAIN] if counts else _estimate_pairs(config, sum(rows.values()))
    to_do = [stage for stage in stages if not stage.is_finished(config)]
    return Preview(
        rows=rows,
        pairs=counts,
        trainings=list(_trainings(config, to_do, num_pairs)),
        workers=_workers(config),
        trials=_trials(config) if tune.STAGE in to_do else "",
        stages=[stage.name for stage in to_do],
        needed=_needed(config, stages),
    )


def _pairs_by_split(config: Config) -> dict[str, int] | None:
    if not pairs.STAGE.is_finished(config):
        return None
    manifest = read_manifest(pairs.STAGE.folder(config))
    assert manifest is not None
    counts: dict[str, int] = manifest["results"]["pairs"]
    return counts


def _estimate_pairs(config: Config, num_rows: int) -> int:
    if config.data.split_column:
        return num_rows
    held_out = config.data.validation_fraction + config.data.test_fraction
    return math.floor(num_rows * (1 - held_out))


def _trainings(
    config: Config, stages: Sequence[Stage], num_pairs: int
) -> Iterator[TrainingPreview]:
    sections: dict[str, TrainingConfig | None] = {
        sft.STAGE.name: config.sft,
        reward.STAGE.name: config.reward,
        train.STAGE.name: config.train,
        tune.STAGE.name: config.train,
    }
    for stage in stages:
        settings = sections.get(stage.name)
        if settings is None:
            continue
        name = stage.name
        num_read = num_pairs
        if stage is reward.STAGE and (folds := config.reward.folds) > 1:
            name = f"each of {folds} trainings of {stage.name}"
            num_read = num_pairs * (folds - 1) // folds
        yield TrainingPreview(
            name,
            _steps(settings, num_read),
            _idle(settings, config.cluster.num_workers),
        )


def _steps(settings: TrainingConfig, num_pairs: int) -> int:
    steps_per_epoch = math.ceil(num_pairs / settings.global_batch_size)
    return count_steps(steps_per_epoch, settings.num_train_epochs, settings.max_steps)


def _idle(settings: TrainingConfig, num_workers: int) -> str:
    if settings.max_tokens_per_device is not None:  # the cut follows the lengths
        return ""
    per_device = settings.per_device_train_batch_size
    micro_batches, turns = count_turns(settings.global_batch_size, per_device, num_workers)
    if micro_batches == turns:
        return ""
    fitting = num_workers * per_device
    return (
        f"{turns - micro_batches} of {turns} micro-batches of a step are empty; "
        f"a multiple of {fitting} pairs fills all"
    )


def _workers(config: Config) -> str:
    cluster = config.cluster
    return f"{cluster.num_workers}, each {cluster.worker_description}"


def _trials(config: Config) -> str:
    keys = ", ".join(config.search_space)
    number = count_trials(config)
    at_a_time = trials_at_a_time(config)
    pace = "as many at a time as fit" if at_a_time is None else f"{at_a_time} at a time"
    return f"{number} over {keys}, {pace}"


def _needed(config: Config, stages: Sequence[Stage]) -> list[str]:
    """Stages whose results are read, and which are neither finished nor among these stages."""
    upstream = [one for stage in stages for one in stage.needed(config)]
    missing = [one for one in dict.fromkeys(upstream) if one not in stages]
    return [stage.name for stage in missing if not stage.is_finished(config)]
