"""Stage margins: the reward margin of every pair and the reference's log-probs, computed once.

What no earlier run of it, and no training that streamed its margins, has scored is computed in one
pass over the pairs, or in one for each scorer (`scoring.one_model_at_a_time`).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.tables import column_names, read_columns, read_split, write_with_columns
from madpo_ray.atomic import write_json
from madpo_ray.config import Config
from madpo_ray.data.splits import folds_of
from madpo_ray.scoring.reasons import MAX_REASONS, check_reasons
from madpo_ray.stages import pairs, reward, reward_source, scores
from madpo_ray.stages.margins_report import write_report
from madpo_ray.stages.sft import initial_policy_content, stages_before_policy
from madpo_ray.stages.stage import Build, Description, Stage

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

SEEN_AND_NOT = (columns.TRAIN, columns.VALIDATION)


def _settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"reference": config.model.numerics()}
    if reward.uses_rewards(config):
        settings["calibration"] = config.margins.calibration
        if not reward.is_trained(config) or config.reward.ensemble:
            settings["reward"] = reward_source.settings(config)
    return settings


def _content(config: Config) -> dict[str, Any]:
    return {**initial_policy_content(config), **reward_source.content(config)}


def _names(config: Config) -> dict[str, Any]:
    """Where the config finds them."""
    return config.reward.model_dump(mode="json", include={"source", "source_revision", "ensemble"})


def _check(config: Config) -> None:
    if reward.uses_rewards(config):
        reward_source.check(config)


def _upstream(config: Config) -> tuple[Stage, ...]:
    rewards = (reward.STAGE,) if reward.is_trained(config) else ()
    return (pairs.STAGE, *stages_before_policy(config), *rewards)


def make(build: Build) -> dict[str, Any]:
    """Writes the pairs with reference log-probs and, if wanted, rewards and margins.

    Raises:
        UserError: margins could not be calibrated, or too many pairs could not be scored.
    """
    from madpo_ray.scoring.streamed import with_margins, with_source

    config = build.config
    for group in scores.grouped(scores.missing_passes(config), config):
        scored = scores.score(config, group, build.notes)
        STAGE.require_upstream(config)  # again, after a pass of hours
        scores.write(group, scored)

    rows = pairs.STAGE.rows(config)
    numbers, reason = _scored(rows, config)
    rejects = _write_rejects(numbers, reason, build)

    # Rewards become margins.
    calibration = None
    if reward.uses_rewards(config):
        sources = config.reward.source_columns
        numbers = with_source(numbers, read_columns(rows, sources), sources)
        splits = read_columns(rows, [columns.SPLIT])[columns.SPLIT]
        held_out = numbers.filter(pc.equal(splits, columns.VALIDATION))
        calibration = scores.calibration(held_out, config)
        write_json(build.folder / "calibration.json", calibration)
        numbers = with_margins(numbers, scores.scaling(calibration, config))

    write_with_columns(
        rows,
        numbers,
        build.rows,
        keep=pc.is_null(reason),
        rows_per_file=config.margins.rows_per_file,
        metadata=_origin(build, calibration),
    )
    results: dict[str, Any] = {
        "splits": _summary(build.rows),
        "calibration": calibration,
        "rejects": rejects,
    }
    if calibration is not None:
        results |= write_report(build, calibration, rejects)
        results["weights_at"] = config.train.weighting
        results["is_in_sample"] = reward.is_trained(config) and config.reward.folds == 1
    if columns.MARGIN_STD in numbers.column_names:
        spread = numbers[columns.MARGIN_STD].filter(pc.is_null(reason))
        results["median_margin_std"] = pc.quantile(spread)[0].as_py()
    return results


def _scored(rows: Path, config: Config) -> tuple[pa.Table, pa.ChunkedArray]:
    """The columns of all scorers, in the order of the pairs, and why pairs have none, or null."""
    numbers = read_columns(rows, [columns.PAIR_ID])
    reason = pa.chunked_array([pa.nulls(numbers.num_rows, pa.string())])
    for one in scores.passes_of(config):
        added = read_columns(one.rows, (*one.scorer.columns, columns.REASON))
        for name in one.scorer.columns:
            numbers = numbers.append_column(name, added[name])
        reason = pc.coalesce(reason, added[columns.REASON])

    if reward.is_trained(config) and config.reward.folds > 1:
        hashes = read_columns(rows, [columns.GROUP_HASH])[columns.GROUP_HASH].to_numpy()
        folds = folds_of(hashes, config.reward.folds)
        numbers = numbers.append_column(columns.FOLD, pa.array(folds, pa.int32()))
    return numbers, reason


def _origin(build: Build, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the rows were made from, for whoever finds one of their files alone."""
    config = build.config
    inputs = STAGE.inputs(config)
    return {
        "fingerprint": build.fingerprint,
        "made_from": {**inputs.upstream, **inputs.content},
        "model": config.model.names(),
        "max_length": config.data.max_length,
        "over_length": config.data.over_length,
        "calibration": calibration,
    }


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


STAGE = Stage(
    name=scores.MARGINS,
    help="Score every pair's margin and the reference's log-probs, once.",
    settings=_settings,
    upstream=_upstream,
    content=_content,
    names=_names,
    check=_check,
    make=make,
    describe=describe,
)


def _write_rejects(numbers: pa.Table, reason: pa.ChunkedArray, build: Build) -> dict[str, int]:
    """Writes the pairs that a scorer failed for to `rejects.parquet`; counts them by reason.

    Raises:
        UserError: they are more than data.max_reject_fraction allows.
    """
    counts = check_reasons(reason, build.config.data.max_reject_fraction)
    table = numbers.select([columns.PAIR_ID]).append_column(columns.REASON, reason)
    table = table.filter(pc.is_valid(table[columns.REASON]))
    pq.write_table(table, build.folder / "rejects.parquet")
    return dict(counts)


def _summary(rows: Path) -> dict[str, Any]:
    """Pairs, and mean margin and share of negative margins if there are any, by split."""
    has_margins = columns.MARGIN in column_names(rows)
    summary = {}
    for split in columns.SPLITS:
        names = (columns.MARGIN,) if has_margins else (columns.PAIR_ID,)
        table = read_split(rows, split, names)
        numbers: dict[str, Any] = {"pairs": table.num_rows}
        if has_margins:
            margin = table[columns.MARGIN]
            is_negative = pc.less(margin, 0).cast(pa.float64())
            numbers["margin"] = pc.mean(margin).as_py()
            numbers["negative_fraction"] = pc.mean(is_negative).as_py()
        summary[split] = numbers
    return summary


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
