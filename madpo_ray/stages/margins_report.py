"""What stage margins writes about its margins: numbers, pictures, and the pairs to look at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split, split_batches
from madpo_ray.atomic import write_json
from madpo_ray.config import Config, PolicyConfig
from madpo_ray.stages import pairs
from madpo_ray.stages.stage import Build

# Torch, scipy and Altair are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

REPORT = "margins_report.json"
SUSPICIOUS = "suspicious.jsonl"
NUM_SUSPICIOUS = 50
CURVE_POINTS = 200


def weights_of(margins: np.ndarray, settings: PolicyConfig) -> np.ndarray:
    """MADPO's weights (N,) of margins (N,), float64, at the settings of section train."""
    import torch

    from madpo_ray.losses import madpo_weight

    values = torch.from_numpy(margins.copy())
    weights: np.ndarray = madpo_weight(values, **settings.weighting).numpy()
    return weights


def write_report(
    build: Build, calibration: Mapping[str, Any], rejects: Mapping[str, int]
) -> dict[str, Any]:
    """Writes numbers, pictures and suspicious pairs next to the rows of a stage.

    Returns the mean weight of the pairs of each split, and those of `weights_by_label`.
    """
    from madpo_ray.scoring.report import (
        accuracy_by_margin,
        describe_margins,
        describe_weights,
        margin_histogram,
    )

    config = build.config
    splits = {}
    for split in columns.SPLITS:
        margins = _margins(build.rows, split)
        splits[split] = describe_margins(margins)
        if len(margins):
            splits[split]["weight"] = describe_weights(weights_of(margins, config.train))

    # Pairs that neither trained the reward model nor fitted the calibration, if there are some.
    held_out = columns.TEST if splits[columns.TEST]["pairs"] else columns.VALIDATION
    by_margin = accuracy_by_margin(_margins(build.rows, held_out))
    histogram = margin_histogram(_margins(build.rows, columns.TRAIN))
    report = {
        "made_with": _made_with(config),
        "counts": _counts(config, rejects, splits),
        "splits": splits,
        "histogram": histogram,
        "weights_at": config.train.weighting,
        "weight_curve": _weight_curve(histogram["edges"], config.train),
        "weights_by_label": _weights_by_label(build.rows, config),
        "calibration": dict(calibration),
        "accuracy_by_margin": {"split": held_out, "bins": by_margin},
    }
    write_json(build.folder / REPORT, report)
    _draw(report, build.folder / "pictures")
    _write_suspicious(build)
    means = {
        split: numbers["weight"]["mean"] for split, numbers in splits.items() if numbers["pairs"]
    }
    return {"mean_weight": means, "weights_by_label": report["weights_by_label"]}


def _margins(rows: Path, split: str) -> np.ndarray:
    margins: np.ndarray = read_split(rows, split, [columns.MARGIN])[columns.MARGIN].to_numpy()
    return margins


def _made_with(config: Config) -> dict[str, Any]:
    """What the margins depend on, in the config's words."""
    return {
        "reward.source": [config.reward.source, *config.reward.ensemble],
        "margins.calibration": config.margins.calibration,
        "data.max_length": config.data.max_length,
        **{f"model.{name}": value for name, value in config.model.names().items()},
    }


def _counts(
    config: Config, rejects: Mapping[str, int], splits: Mapping[str, Any]
) -> dict[str, Any]:
    """Pairs read, rejected and left out by reason, and written: they add up."""
    before = pairs.STAGE.require(config)
    rejected = {**before["rejects"], **rejects}
    return {
        "read": sum(sum(before[name].values()) for name in ("pairs", "rejects", "left_out")),
        "rejected": rejected,
        "left_out": before["left_out"],
        "written": sum(numbers["pairs"] for numbers in splits.values()),
        "cut_responses": before["cut_responses"],
    }


def _weights_by_label(rows: Path, config: Config) -> dict[str, dict[str, float]]:
    """Weights of the training pairs whose labels agree with their true scores, and of the others.

    Empty without true scores. Pairs whose scores are equal or missing are left out.
    """
    if not config.score_columns:
        return {}
    table = read_split(rows, columns.TRAIN, [columns.MARGIN, *config.score_columns])
    chosen, rejected = (table[name].to_numpy() for name in config.score_columns)
    weights = weights_of(table[columns.MARGIN].to_numpy(), config.train)
    found = {}
    for label, is_of_it in (("right", chosen > rejected), ("wrong", chosen < rejected)):
        if is_of_it.any():
            mean = float(weights[is_of_it].mean())
            found[label] = {"pairs": int(is_of_it.sum()), "mean_weight": mean}
    return found


def _weight_curve(edges: list[float], settings: PolicyConfig) -> dict[str, list[float]]:
    """MADPO's weight over the range of a histogram."""
    at = np.linspace(edges[0], edges[-1], CURVE_POINTS)
    return {"margin": at.tolist(), "weight": weights_of(at, settings).tolist()}


def _draw(report: Mapping[str, Any], folder: Path) -> None:
    from madpo_ray.evaluation import charts

    folder.mkdir()
    for name, chart in charts.margin_charts(report).items():
        charts.save_picture(chart, folder / f"{name}.png")


def _write_suspicious(build: Build) -> None:
    """The training pairs with the most negative margins: labels to look at, the worst first."""
    from madpo_ray.scoring.report import most_negative

    table = read_split(build.rows, columns.TRAIN, [columns.PAIR_ID, columns.MARGIN])
    margins = table[columns.MARGIN].to_numpy()
    worst = most_negative(margins, NUM_SUSPICIOUS)
    ids = table[columns.PAIR_ID].take(pa.array(worst, pa.int64())).to_pylist()
    texts = _texts(build.rows, ids)
    weights = weights_of(margins[worst], build.config.train)
    with (build.folder / SUSPICIOUS).open("w", encoding="utf-8") as stream:
        for pair_id, place, weight in zip(ids, worst, weights.tolist(), strict=True):
            numbers = {
                columns.PAIR_ID: pair_id,
                columns.MARGIN: float(margins[place]),
                "weight": weight,
            }
            stream.write(json.dumps(numbers | texts[pair_id], ensure_ascii=False) + "\n")


def _texts(rows: Path, ids: list[str]) -> dict[str, dict[str, str]]:
    """The texts of some pairs, by pair_id."""
    found: dict[str, dict[str, str]] = {}
    for table in split_batches(rows, columns.TRAIN, [columns.PAIR_ID, *columns.TEXT_COLUMNS]):
        own = table.filter(pc.is_in(table[columns.PAIR_ID], value_set=pa.array(ids, pa.string())))
        for row in own.drop_columns([columns.SPLIT]).to_pylist():
            found[row.pop(columns.PAIR_ID)] = row
    return found
