"""What a run's folder holds, for its report. Nothing here changes the run."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from madpo_ray.artifacts.manifest import changed_since, flat, read_manifest
from madpo_ray.artifacts.tables import rows_files, rows_folder
from madpo_ray.columns import TRAIN
from madpo_ray.config.files import read_yaml
from madpo_ray.errors import UserError
from madpo_ray.stages import evaluate, margins, pairs, reward, sft, train, tune
from madpo_ray.stages.margins_report import REPORT, SUSPICIOUS
from madpo_ray.stages.stage import Stage
from madpo_ray.training.metrics import METRICS_FILE, read_metrics

logger = logging.getLogger(__name__)

MAX_SAMPLES = 20
MAX_REJECTS = 50
MAX_SUSPICIOUS = 30


@dataclass
class FinishedStage:
    """One line of the pipeline's table."""

    name: str
    seconds: float | None
    rows: int | None  # that it wrote; of a training, the pairs of its split
    lines: list[str]


@dataclass
class Run:
    """A run, as far as it has come. What it does not have is empty."""

    name: str
    folder: Path
    stages: list[FinishedStage] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    margins: dict[str, Any] = field(default_factory=dict)
    suspicious: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by training
    evaluation: dict[str, Any] = field(default_factory=dict)
    samples: pa.Table | None = None
    search: dict[str, Any] = field(default_factory=dict)
    rejects: list[dict[str, Any]] = field(default_factory=list)  # the first of each stage
    num_rejects: dict[str, int] = field(default_factory=dict)  # by stage


def collect(folder: Path, stages: Sequence[Stage]) -> Run:
    """Reads a run's folder.

    Args:
        stages: in their order.

    Raises:
        UserError: it has no finished stage.
    """
    run = Run(name=folder.resolve().name, folder=folder)
    config_file = folder / "config.yaml"
    if config_file.is_file():
        run.config = flat(read_yaml(config_file.read_text(encoding="utf-8")) or {})
    found = {stage: read_manifest(folder / stage.name) for stage in stages}
    for stage, manifest in found.items():
        if manifest is not None:
            run.stages.append(_finished(stage, manifest, run, _count_rows(stage, found, folder)))
            run.versions = manifest.get("versions", {})
    if not run.stages:
        raise UserError(
            f"{folder} has no finished stage: give the folder storage_path/name of a run"
        )

    run.margins = _read_json(folder / margins.STAGE.name / REPORT)
    run.suspicious = _read_lines(folder / margins.STAGE.name / SUSPICIOUS)[:MAX_SUSPICIOUS]
    run.metrics = _metrics(folder)
    run.evaluation = _read_json(folder / evaluate.STAGE.name / "evaluation.json")
    samples = folder / evaluate.STAGE.name / evaluate.SAMPLES
    if samples.is_file():
        run.samples = pq.read_table(samples).slice(0, MAX_SAMPLES)
    run.search = _read_json(folder / tune.STAGE.name / "trials.json")
    for stage in (pairs.STAGE, margins.STAGE):
        _add_rejects(run, stage.name)
    return run


def _finished(stage: Stage, manifest: dict[str, Any], run: Run, rows: int | None) -> FinishedStage:
    """What a stage printed, and what of the run has changed since it was made."""
    try:
        lines = [line for line in stage.describe(manifest["results"]) if isinstance(line, str)]
    except (KeyError, TypeError) as error:  # of another version of this package
        logger.warning("%s: its results cannot be described: %s", stage.name, error)
        lines = []
    if changed := changed_since(run.folder, manifest["inputs"].get("upstream", {})):
        lines.append(f"made from an earlier {' and '.join(changed)}")
    # The config is of the last `madpo-ray run`, which may have been stopped.
    settings = manifest["inputs"].get("settings", {})
    own = flat(settings)
    searched = settings.get("search_space", {})  # `tune --retrain` sets them
    for key in sorted(own.keys() & run.config.keys() - searched.keys()):
        if own[key] != run.config[key]:
            lines.append(f"made with {key} {own[key]}, not {run.config[key]} as in config.yaml")
    return FinishedStage(stage.name, manifest.get("seconds"), rows, lines)


def _count_rows(
    stage: Stage, manifests: Mapping[Stage, dict[str, Any] | None], folder: Path
) -> int | None:
    """What a stage wrote or, of a training, the pairs that it had; None if that is not known."""
    own = folder / stage.name
    files = rows_files(rows_folder(own)) or list(own.glob(evaluate.SAMPLES))
    if files:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    if not any(own.rglob(METRICS_FILE)):
        return None
    try:
        if stage is train.STAGE and (scored := manifests.get(margins.STAGE)):
            return int(scored["results"]["splits"][TRAIN]["pairs"])
        read = manifests.get(pairs.STAGE)
        return int(read["results"]["pairs"][TRAIN]) if read else None
    except (KeyError, TypeError):  # of another version of this package
        return None


def _metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each training that left some, with reward's folds."""
    found = {}
    for name in (sft.STAGE.name, reward.STAGE.name, train.STAGE.name):
        for file in sorted((folder / name).rglob(METRICS_FILE)):
            training = file.parent.relative_to(folder).as_posix()
            found[training] = read_metrics(file)
    return {name: lines for name, lines in found.items() if lines}


def _add_rejects(run: Run, stage: str) -> None:
    """The rows or pairs that a stage rejected."""
    file = run.folder / stage / "rejects.parquet"
    if not file.is_file():
        return
    rejects = pq.read_table(file)
    run.num_rejects[stage] = rejects.num_rows
    run.rejects += [{"stage": stage, **row} for row in rejects.slice(0, MAX_REJECTS).to_pylist()]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
