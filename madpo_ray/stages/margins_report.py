"""What stage margins writes about its margins: numbers, pictures, and the pairs to look at."""

import functools
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

# Torch, scipy and matplotlib are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

REPORT = "margins_report.json"
SUSPICIOUS = "suspicious.jsonl"
NUM_SUSPICIOUS = 50


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

    Returns the mean weight of the pairs of each split.
    """
    from madpo_ray.scoring.report import accuracy_by_margin, describe_margins, describe_weights

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
    write_json(
        build.folder / REPORT,
        {
            "made_with": _made_with(config),
            "counts": _counts(config, rejects, splits),
            "splits": splits,
            "weights_at": config.train.weighting,
            "calibration": dict(calibration),
            "accuracy_by_margin": {"split": held_out, "bins": by_margin},
        },
    )
    _draw(build, calibration, by_margin, held_out)
    _write_suspicious(build)
    return {
        split: numbers["weight"]["mean"] for split, numbers in splits.items() if numbers["pairs"]
    }


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


def _draw(
    build: Build,
    calibration: Mapping[str, Any],
    by_margin: list[dict[str, Any]],
    held_out: str,
) -> None:
    from madpo_ray.evaluation import charts

    folder = build.folder / "pictures"
    folder.mkdir()
    settings = build.config.train
    weight = functools.partial(weights_of, settings=settings)
    train = _margins(build.rows, columns.TRAIN)
    title = f"Margins of {len(train)} training pairs, and MADPO's weight"
    charts.draw_margins(train, weight, title, folder / "margins.png")
    charts.draw_reliability(
        calibration["reliability_before"],
        calibration.get("reliability_after", []),
        folder / "reliability.png",
    )
    title = f"Accuracy of the margin's sign, {held_out} pairs"
    charts.draw_accuracy(by_margin, title, folder / "accuracy.png")


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
