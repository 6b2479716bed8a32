"""What stage margins reports: numbers, pictures, the pairs to look at, and lines."""

import json
from collections import Counter
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
from madpo_ray.scoring.reasons import MAX_REASONS
from madpo_ray.stages import pairs
from madpo_ray.stages.stage import Build, Description

# Torch, scipy and Altair are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

REPORT = "margins_report.json"
SUSPICIOUS = "suspicious.jsonl"
NUM_SUSPICIOUS = 50
CURVE_POINTS = 200
SEEN_AND_NOT = (columns.TRAIN, columns.VALIDATION)


def weights_of(margins: np.ndarray, settings: PolicyConfig) -> np.ndarray:
    """MADPO's weights (N,) of margins (N,), float64, at the settings of section train."""
    import torch

    from madpo_ray.losses import madpo_weight

    values = torch.from_numpy(margins.copy())
    weights: np.ndarray = madpo_weight(values, **settings.weighting).numpy()
    return weights


def write_margins_report(
    build: Build, calibration: Mapping[str, Any], counts: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes numbers, pictures and suspicious pairs next to the rows of a stage.

    Args:
        counts: what `count_pairs` gave.

    Returns the mean weight of the pairs of each split, those of `weights_by_label`, and alarms.
    """
    from madpo_ray.scoring.report import (
        accuracy_by_margin,
        describe_margins,
        describe_weights,
        find_alarms,
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
    unseen = _margins(build.rows, held_out)
    alarms = find_alarms(
        unseen,
        lambda margins: weights_of(margins, config.train),
        tau=config.train.tau,
        calibration=calibration,
    )
    histogram = margin_histogram(_margins(build.rows, columns.TRAIN))
    report = {
        "made_with": _made_with(config),
        "counts": dict(counts),
        "splits": splits,
        "histogram": histogram,
        "weights_at": config.train.weighting,
        "weight_curve": _weight_curve(histogram["edges"], config.train),
        "weights_by_label": _weights_by_label(build.rows, config),
        "calibration": dict(calibration),
        "alarms": alarms,
        "accuracy_by_margin": {"split": held_out, "bins": accuracy_by_margin(unseen)},
    }
    write_json(build.folder / REPORT, report)
    _draw(report, build.folder / "pictures")
    _write_suspicious(build)
    means = {
        split: numbers["weight"]["mean"] for split, numbers in splits.items() if numbers["pairs"]
    }
    by_label = report["weights_by_label"]
    return {"mean_weight": means, "weights_by_label": by_label, "alarms": alarms}


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


def count_pairs(
    config: Config, rejects: Mapping[str, int], splits: Mapping[str, Any]
) -> dict[str, Any]:
    """Pairs read, rejected and left out by reason, and written: they add up."""
    before = pairs.STAGE.require(config)
    rejected = dict(Counter(before["rejects"]) + Counter(rejects))
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


def describe(results: Mapping[str, Any]) -> Description:
    """Calibration, one line per split, mean weights, and pairs that could not be scored."""
    rejects = Counter(results["rejects"])
    failed = []
    if rejects:
        failed.append(f"{rejects.total()} pairs could not be scored, listed in rejects.parquet:")
        failed += [f"  {count} x {kind}" for kind, count in rejects.most_common(MAX_REASONS)]
    return [
        *_describe_splits(results),
        *_describe_optimism(results),
        *_describe_ensemble(results),
        *_describe_weights(results),
        *results.get("alarms", ()),
        *failed,
    ]


def _describe_optimism(results: Mapping[str, Any]) -> list[str]:
    """What a reward model that has seen the training pairs makes of them."""
    if not results.get("is_in_sample"):
        return []
    fractions = [results["splits"][split]["negative_fraction"] for split in SEEN_AND_NOT]
    if None in fractions:
        return []
    seen, unseen = (1 - fraction for fraction in fractions)
    return [
        f"positive margins: {seen:.1%} of the training pairs, which the reward model has seen, and "
        f"{unseen:.1%} of the validation pairs (reward.folds above 1 scores only unseen pairs)"
    ]


def _describe_ensemble(results: Mapping[str, Any]) -> list[str]:
    """How much several reward models differ."""
    spread = results.get("median_margin_std")
    if spread is None:
        return []
    return [
        f"the reward models' margins of a pair differ by a standard deviation of {spread:.3f} "
        f"(median, before calibration; column {columns.MARGIN_STD})"
    ]


def _describe_weights(results: Mapping[str, Any]) -> list[str]:
    """The mean weight, which shows margins that are not calibrated."""
    means = results.get("mean_weight")
    if not means:
        return []
    shown = ", ".join(f"{mean:.3f} {split}" for split, mean in means.items())
    settings = ", ".join(f"{name} {value:g}" for name, value in results["weights_at"].items())
    lines = [f"mean weight {shown} at {settings}; 1 for calibrated margins below tau"]
    by_label = results["weights_by_label"]
    if by_label:
        shown = ", ".join(
            f"{one['mean_weight']:.3f} over {one['pairs']} pairs whose label is {label}"
            for label, one in by_label.items()
        )
        lines.append(f"mean weight by the true scores: {shown}")
    return lines


def _describe_splits(results: Mapping[str, Any]) -> list[str]:
    calibration = results["calibration"]
    if calibration is None:
        counts = ", ".join(
            f"{numbers['pairs']} {split}" for split, numbers in results["splits"].items()
        )
        return [f"{counts} pairs with reference log-probs; no reward model, so no margins"]

    lines = [_describe_calibration(calibration)]
    for split, numbers in results["splits"].items():
        if numbers["pairs"]:
            lines.append(
                f"{split}: {numbers['pairs']} pairs, mean margin {numbers['margin']:.3f}, "
                f"{numbers['negative_fraction']:.1%} negative"
            )
    return lines


def _describe_calibration(report: Mapping[str, Any]) -> str:
    low, high = report["accuracy_interval"]
    accuracy = (
        f"validation accuracy of the reward model {report['accuracy']:.3f} "
        f"(95 % {low:.3f} to {high:.3f})"
    )
    if "reason" in report:
        return f"{accuracy}; not calibrated: {report['reason']}"
    if report["method"] == "none":
        return (
            f"{accuracy}, ECE {report['ece_before']:.3f}, Brier {report['brier_before']:.3f}; not "
            "calibrated, as margins.calibration asks"
        )
    if report["method"] == "isotonic":
        scaling = f"isotonic regression with {len(report['knots'])} knots"
    else:
        scaling = f"temperature {report['temperature']:.2f}"
    if "ece_after" not in report:
        return (
            f"{accuracy}, {scaling}, ECE {report['ece_before']:.3f}, Brier "
            f"{report['brier_before']:.3f}; the pairs are too few to measure the errors after it"
        )
    return (
        f"{accuracy}, {scaling}, "
        f"ECE {report['ece_before']:.3f} -> {report['ece_after']:.3f}, "
        f"Brier {report['brier_before']:.3f} -> {report['brier_after']:.3f}"
    )
