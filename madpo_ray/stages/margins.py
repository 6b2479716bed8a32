"""Stage margins: the reward margin of every pair and the reference's log-probs, computed once.

What no earlier run of it, and no training that streamed its margins, has scored is computed in one
pass over the pairs, or in one for each scorer (`scoring.one_model_at_a_time`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.tables import (
    column_names,
    first_row,
    read_columns,
    read_split,
    write_with_columns,
)
from madpo_ray.atomic import write_json
from madpo_ray.config import Config
from madpo_ray.data.messages import from_text
from madpo_ray.data.splits import folds_of
from madpo_ray.models.source import base_model
from madpo_ray.scoring.reasons import check_reasons
from madpo_ray.stages import pairs, reward, reward_source, scores
from madpo_ray.stages.margins_report import count_pairs, describe, write_margins_report
from madpo_ray.stages.sft import initial_policy_content, stages_before_policy
from madpo_ray.stages.stage import Build, Stage

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.


def _settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"reference": config.model.numerics()}
    if reward.uses_rewards(config):
        settings["calibration"] = config.margins.calibration
        if not reward.trains_model(config) or config.reward.ensemble:
            settings["reward"] = reward_source.settings(config)
    return settings


def _content(config: Config) -> dict[str, Any]:
    return {**initial_policy_content(config), **reward_source.content(config)}


def _names(config: Config) -> dict[str, Any]:
    """Where the config finds them."""
    return config.reward.model_dump(mode="json", include={"source", "source_revision", "ensemble"})


def _check(config: Config) -> None:
    if not reward.uses_rewards(config):
        return
    reward_source.check(config)
    if pairs.STAGE.is_finished(config):
        first = first_row(pairs.STAGE.rows(config), [columns.PROMPT])
        reward_source.check_reads(config, from_text(first[columns.PROMPT]))
        _check_given_margins(config)


def _check_given_margins(config: Config) -> None:
    """Raises UserError if margins that are in the data cannot be calibrated."""
    if config.reward.source_kind != "columns":
        return
    from madpo_ray.scoring.scaling import fit_scaling
    from madpo_ray.scoring.streamed import margins_of, with_source

    names = config.reward.source_columns
    rows = pairs.STAGE.rows(config)
    validation = read_split(rows, columns.VALIDATION, [columns.PAIR_ID, *names])
    scored = with_source(validation.select([columns.PAIR_ID]), validation, names)
    if fit_scaling(margins_of(scored).to_numpy(), config.margins.calibration) is None:
        scores.scaling(scores.calibration(scored, config), config)  # says why


def _upstream(config: Config) -> tuple[Stage, ...]:
    rewards = (reward.STAGE,) if reward.trains_model(config) else ()
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
    splits = _summary(build.rows)
    results: dict[str, Any] = {
        "splits": splits,
        "counts": count_pairs(config, rejects, splits),
        "calibration": calibration,
        "rejects": rejects,
    }
    if calibration is not None:
        results |= write_margins_report(build, calibration, results["counts"])
        results["weights_at"] = config.train.weighting
        results["is_in_sample"] = reward.trains_model(config) and config.reward.folds == 1
    if columns.MARGIN_STD in numbers.column_names:
        spread = numbers[columns.MARGIN_STD].filter(pc.is_null(reason))
        results["median_margin_std"] = pc.quantile(spread)[0].as_py()
    return results


def _scored(rows: Path, config: Config) -> tuple[pa.Table, pa.ChunkedArray]:
    """The columns of all scorers, in the order of the pairs, and why pairs have none, or null."""
    numbers = read_columns(rows, [columns.PAIR_ID])
    reason = pa.chunked_array([pa.nulls(numbers.num_rows, pa.string())])
    for one in scores.passes_of(config):
        added = read_columns(one.rows, (columns.PAIR_ID, *one.scorer.columns, columns.REASON))
        if added[columns.PAIR_ID] != numbers[columns.PAIR_ID]:
            raise RuntimeError(f"{one.rows} has the scores of other pairs: remove {one.folder}")
        for name in one.scorer.columns:
            numbers = numbers.append_column(name, added[name])
        reason = pc.coalesce(reason, added[columns.REASON])

    if reward.trains_model(config) and config.reward.folds > 1:
        hashes = read_columns(rows, [columns.GROUP_HASH])[columns.GROUP_HASH].to_numpy()
        folds = folds_of(hashes, config.reward.folds)
        numbers = numbers.append_column(columns.FOLD, pa.array(folds, pa.int32()))
    return numbers, reason


def _origin(build: Build, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the rows were made from, for whoever finds one of their files alone."""
    from madpo_ray.models.loading import load_tokenizer

    config = build.config
    inputs = STAGE.inputs(config)
    tokenizer = load_tokenizer(base_model(config.model, config.run), config.model)
    return {
        "fingerprint": build.fingerprint,
        "made_from": {**inputs.upstream, **inputs.content},
        "model": config.model.names(),
        "chat_template": tokenizer.chat_template,
        "max_length": config.data.max_length,
        "over_length": config.data.over_length,
        "calibration": calibration,
    }


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
