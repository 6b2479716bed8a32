"""Stage margins: the reward margin of every pair and the reference's log-probs, computed once.

Each scorer's numbers are an artifact of their own below `scores/`, so that another reward model
does not repeat the reference pass, and another reference not the reward pass. What is missing is
computed in one pass over the pairs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray import columns
from madpo_ray.artifacts.building import building, recover
from madpo_ray.artifacts.manifest import Inputs, is_finished
from madpo_ray.artifacts.tables import (
    column_names,
    read_columns,
    read_split,
    rows_folder,
    write_table,
    write_with_columns,
)
from madpo_ray.atomic import write_json
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.stages import pairs, reward, reward_source
from madpo_ray.stages.sft import (
    initial_policy,
    initial_policy_content,
    initial_policy_inputs,
    stages_before_policy,
)
from madpo_ray.stages.stage import KEPT, Build, Description, Stage

if TYPE_CHECKING:
    from madpo_ray.scoring.scorers import Scorer

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.


def _settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"reference": config.model.numerics()}
    if reward.uses_rewards(config):
        settings["calibrate"] = config.margins.calibrate
        if not reward.is_trained(config):
            settings["reward"] = reward_source.settings(config)
    return settings


def _content(config: Config) -> dict[str, Any]:
    return {**initial_policy_content(config), **reward_source.content(config)}


def _check(config: Config) -> None:
    if reward.uses_rewards(config):
        reward_source.content(config)


def _upstream(config: Config) -> tuple[Stage, ...]:
    rewards = (reward.STAGE,) if reward.is_trained(config) else ()
    return (pairs.STAGE, *stages_before_policy(config), *rewards)


def make(build: Build) -> dict[str, Any]:
    """Writes the pairs with reference log-probs and, if wanted, rewards and margins.

    Raises:
        UserError: no temperature could be fitted.
    """
    config = build.config
    passes = _passes(config)
    _score_missing(passes, build)

    # The columns of all scorers, in the order of the pairs.
    rows = pairs.STAGE.rows(config)
    scores = read_columns(passes[0].rows, [columns.PAIR_ID])
    for one in passes:
        added = read_columns(one.rows, one.scorer.columns)
        for name in one.scorer.columns:
            scores = scores.append_column(name, added[name])

    # Rewards become margins.
    calibration = None
    if reward.uses_rewards(config):
        if config.reward.source_kind == "columns":
            scores = reward_source.with_columns(rows, scores, config.reward.source_columns)
        calibration = _calibration(rows, scores)
        write_json(build.folder / "calibration.json", calibration)
        scores = _with_margins(scores, _temperature(calibration, config))

    write_with_columns(rows, scores, build.rows)
    return {"splits": _summary(build.rows), "calibration": calibration}


def describe(results: Mapping[str, Any]) -> Description:
    """Calibration, and one line per split."""
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
    name="margins",
    help="Score every pair's margin and the reference's log-probs, once.",
    settings=_settings,
    upstream=_upstream,
    content=_content,
    names=lambda config: {"reward": config.reward.source},
    check=_check,
    make=make,
    describe=describe,
)


@dataclass(frozen=True)
class _Pass:
    """One scorer's numbers for all pairs: an artifact of its own."""

    inputs: Inputs
    scorer: "Scorer"
    folder: Path

    @property
    def rows(self) -> Path:
        return rows_folder(self.folder)


def _passes(config: Config) -> list[_Pass]:
    from madpo_ray.scoring.scorers import PolicyLogps

    folder = config.run.folder / "scores"
    batch_size = config.scoring.per_device_batch_size
    upstream = {"pairs": pairs.STAGE.inputs(config).fingerprint}

    # The reference's log-probs.
    reference = PolicyLogps(
        initial_policy(config), config.model, columns=columns.REF_LOGPS, batch_size=batch_size
    )
    reference_inputs = Inputs(
        STAGE.name,
        settings=config.model.numerics(),
        upstream=upstream,
        content={"reference": initial_policy_inputs(config).fingerprint},
    )
    passes = [_Pass(reference_inputs, reference, folder / "reference")]

    # The rewards, unless they are in the data.
    if reward.uses_rewards(config) and config.reward.source_kind != "columns":
        if reward.is_trained(config):
            fingerprint = reward.STAGE.inputs(config).fingerprint
            reward_inputs = Inputs(STAGE.name, upstream={**upstream, "reward": fingerprint})
        else:
            reward_inputs = Inputs(
                STAGE.name,
                settings=reward_source.settings(config),
                upstream=upstream,
                content=reward_source.content(config),
            )
        passes.insert(0, _Pass(reward_inputs, reward_source.scorer(config), folder / "reward"))
    return passes


def _score_missing(passes: Sequence[_Pass], build: Build) -> None:
    """Computes what is not there yet, in one pass over the pairs."""
    config = build.config
    for one in passes:
        recover(one.folder, one.inputs)
    missing = [one for one in passes if not is_finished(one.folder, one.inputs)]
    if not missing:
        return
    from madpo_ray.scoring.actors import score_rows

    fingerprints = "".join(one.inputs.fingerprint for one in missing)
    name = hashlib.sha256(fingerprints.encode()).hexdigest()[:16]
    scored = score_rows(
        pairs.STAGE.rows(config),
        [one.scorer for one in missing],
        config.cluster,
        batch_size=config.scoring.batch_size,
        notes=build.notes,
        kept=config.run.ray_folder / f"{STAGE.name}-{name}" / KEPT,
    )
    STAGE.require_upstream(config)  # again, after a pass of hours
    for one in missing:
        with building(one.folder, one.inputs) as (folder, _):
            own = scored.select([columns.PAIR_ID, *one.scorer.columns])
            write_table(own, rows_folder(folder))


def _calibration(rows: Path, scores: pa.Table) -> dict[str, Any]:
    """How well calibrated the margins of the validation pairs are."""
    from madpo_ray.scoring.calibration import calibration_report

    splits = read_columns(rows, [columns.SPLIT])[columns.SPLIT]
    held_out = scores.filter(pc.equal(splits, columns.VALIDATION))
    return calibration_report(_margins(held_out).to_numpy())


def _temperature(calibration: Mapping[str, Any], config: Config) -> float:
    """What rewards are divided by."""
    if not config.margins.calibrate:
        return 1.0
    temperature: float | None = calibration["temperature"]
    if temperature is None:
        raise UserError(
            f"the reward model cannot be calibrated: {calibration['reason']}. Train it longer or "
            "on more pairs; margins.calibrate: false uses its margins as they are"
        )
    return temperature


def _with_margins(scores: pa.Table, temperature: float) -> pa.Table:
    """Rewards and margins, divided by the temperature."""
    for name in (*columns.REWARDS, columns.MARGIN):
        if name in scores.column_names:
            index = scores.column_names.index(name)
            scores = scores.set_column(index, name, pc.divide(scores[name], temperature))
    if columns.MARGIN in scores.column_names:
        return scores
    return scores.append_column(columns.MARGIN, _margins(scores))


def _margins(scores: pa.Table) -> pa.ChunkedArray:
    """The margin that the data brings, or the difference of rewards."""
    if columns.MARGIN in scores.column_names:
        return scores[columns.MARGIN]
    chosen, rejected = (scores[name] for name in columns.REWARDS)
    return pc.subtract(chosen, rejected)


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
    if report["temperature"] is None:
        return f"{accuracy}; not calibrated: {report['reason']}"
    return (
        f"{accuracy}, temperature {report['temperature']:.2f}, "
        f"ECE {report['ece_before']:.3f} -> {report['ece_after']:.3f}, "
        f"Brier {report['brier_before']:.3f} -> {report['brier_after']:.3f}"
    )
