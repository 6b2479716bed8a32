"""What a run would do, without a model or a cluster: rows, steps, workers."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from madpo_ray import pairs
from madpo_ray.artifacts import is_finished, read_manifest
from madpo_ray.config import Config, TrainingConfig
from madpo_ray.pipeline import check, pending


def preview(config: Config, command: str = "run") -> dict[str, Any]:
    """Row counts (of the files, and by split once stage pairs is done), optimizer steps, workers, stages to do.

    Raises UserError as the stages themselves would.
    """
    check(config)
    rows = {file: _count_rows(Path(file)) for file in config.data.files}
    numbers: dict[str, Any] = {"rows": rows}
    fetched = Path(config.model.model_name_or_path).is_absolute()  # a hub name is not looked up here
    if fetched and is_finished(pairs.folder(config), pairs.inputs(config)):
        manifest = read_manifest(pairs.folder(config))
        assert manifest is not None
        splits = manifest["results"]["pairs"]
        numbers["pairs"], training = splits, splits["train"]
    else:
        held_out = config.data.validation_fraction + config.data.test_fraction
        training = math.floor(sum(rows.values()) * (1 if config.data.split_column else 1 - held_out))
        numbers["pairs"] = "known once stage pairs is done; steps are estimates from the rows"
    for name, settings in (("sft", config.sft), ("reward", config.reward), ("train", config.train)):
        if settings is not None:
            numbers[f"steps of {name}"] = _steps(settings, training)
            if idle := _idle(settings, config.cluster.num_workers):
                numbers[f"idle in {name}"] = idle
    cluster = config.cluster
    numbers["workers"] = f"{cluster.num_workers}, each {cluster.cpus_per_worker:g} CPUs" + (
        " and a GPU" if cluster.use_gpu else ""
    )
    if command == "tune":
        numbers["trials"] = f"{config.tune.num_samples}, {config.tune.max_concurrent_trials} at a time"
    elif fetched:
        todo = [stage.name for stage in pending(config) if command in ("run", stage.name)]
        numbers["stages to do"] = ", ".join(todo) or "none"
    return numbers


def _steps(settings: TrainingConfig, pairs_to_train: int) -> int:
    epochs = settings.num_train_epochs * math.ceil(pairs_to_train / settings.global_batch_size)
    return settings.max_steps if settings.max_steps > 0 else epochs


def _idle(settings: TrainingConfig, num_workers: int) -> str:
    """What of a step's work finds no worker's turn filled, in words; empty where all is."""
    if settings.max_tokens_per_device is not None:  # the cut follows the lengths
        return ""
    planned = math.ceil(settings.global_batch_size / settings.per_device_train_batch_size)
    turns = math.ceil(planned / num_workers) * num_workers
    if planned == turns:
        return ""
    fitting = num_workers * settings.per_device_train_batch_size
    return f"{turns - planned} of {turns} micro-batches of a step are empty; a multiple of {fitting} pairs fills all"


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as stream:
        return sum(1 for _ in stream)
