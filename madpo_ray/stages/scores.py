"""Each scorer's numbers, an artifact of its own below `scores/`, and what of them is missing.

Another reward model does not repeat the reference pass, and another reference not the reward pass.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray import columns
from madpo_ray.artifacts.building import building, recover
from madpo_ray.artifacts.manifest import Inputs, is_finished
from madpo_ray.artifacts.tables import read_split, rows_folder, write_table
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.passes import BatchNotes
from madpo_ray.scoring.reasons import check_reasons
from madpo_ray.stages import pairs, reward, reward_source
from madpo_ray.stages.sft import initial_policy, initial_policy_inputs
from madpo_ray.stages.stage import KEPT

if TYPE_CHECKING:
    from madpo_ray.scoring.scaling import Scaling
    from madpo_ray.scoring.scorers import Scorer
    from madpo_ray.scoring.streamed import StreamedScores

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

logger = logging.getLogger(__name__)

MARGINS = "margins"  # the stage whose scores these are


@dataclass(frozen=True)
class Pass:
    """One scorer's numbers for all pairs: an artifact of its own."""

    inputs: Inputs
    scorer: "Scorer"
    folder: Path

    @property
    def rows(self) -> Path:
        return rows_folder(self.folder)

    def is_finished(self) -> bool:
        return is_finished(self.folder, self.inputs)


def passes_of(config: Config) -> list[Pass]:
    """Those that a run needs: rewards, unless they are in the data, and the reference."""
    from madpo_ray.scoring.scorers import PolicyLogps

    folder = config.run.folder / "scores"
    upstream = {"pairs": pairs.STAGE.inputs(config).fingerprint}

    # The reference's log-probs.
    reference = PolicyLogps(
        initial_policy(config),
        config.model,
        columns=columns.REF_LOGPS,
        forward=config.scoring.forward,
    )
    reference_inputs = Inputs(
        MARGINS,
        settings=config.model.numerics(),
        upstream=upstream,
        content={"reference": initial_policy_inputs(config).fingerprint},
    )
    passes = [Pass(reference_inputs, reference, folder / "reference")]

    # The rewards, unless they are in the data.
    if reward.uses_rewards(config) and config.reward.source_kind != "columns":
        if reward.trains_model(config):
            upstream = {**upstream, "reward": reward.STAGE.inputs(config).fingerprint}
        reward_inputs = Inputs(
            MARGINS,
            settings=reward_source.settings(config),
            upstream=upstream,
            content=reward_source.content(config),
        )
        passes.insert(0, Pass(reward_inputs, reward_source.scorer(config), folder / "reward"))
    return passes


def missing_passes(config: Config) -> list[Pass]:
    """Those whose artifact is not there, after finishing what a kill interrupted."""
    passes = passes_of(config)
    for one in passes:
        recover(one.folder, one.inputs)
    return [one for one in passes if not one.is_finished()]


def kept_folder(config: Config) -> Path:
    """Where scored pairs are kept until the stage is finished."""
    fingerprints = "".join(one.inputs.fingerprint for one in passes_of(config))
    name = hashlib.sha256(fingerprints.encode()).hexdigest()[:16]
    return config.run.ray_folder / f"{MARGINS}-{name}" / KEPT


def grouped(missing: Sequence[Pass], config: Config) -> list[list[Pass]]:
    """Those whose models an actor holds together.

    Reward models of several folds, or of an ensemble, are one scorer: they stay together.
    """
    if config.scoring.one_model_at_a_time:
        return [[one] for one in missing]
    return [list(missing)] if missing else []


def score(
    config: Config,
    missing: Sequence[Pass],
    notes: BatchNotes,
    splits: Sequence[str] = columns.SPLITS,
) -> pa.Table:
    """pair_id, the missing columns and a reason of the pairs of some splits, in one pass.

    Raises:
        UserError: more pairs cannot be scored than data.max_reject_fraction allows.
    """
    from madpo_ray.scoring.actors import score_rows

    logger.info("scores of this pass: %s", ", ".join(one.folder.name for one in missing))
    scored = score_rows(
        pairs.STAGE.rows(config),
        [one.scorer for one in missing],
        config.actors,
        batch_size=config.scoring.batch_size,
        notes=notes,
        kept=kept_folder(config),
        splits=splits,
    )
    check_reasons(scored[columns.REASON], config.data.max_reject_fraction)
    return scored


def write(missing: Sequence[Pass], scored: pa.Table) -> None:
    """Makes the artifacts of the passes that were missing."""
    for one in missing:
        own = scored.select([columns.PAIR_ID, *one.scorer.columns])
        # A reason is of the scorer that gave no number.
        has_failed = pc.is_nan(own[one.scorer.columns[0]])
        reason = pc.if_else(has_failed, scored[columns.REASON], None)
        with building(one.folder, one.inputs) as (folder, _):
            write_table(own.append_column(columns.REASON, reason), rows_folder(folder))


def streamed_scores(config: Config, notes: BatchNotes) -> "StreamedScores":
    """What a training needs to score pairs while it reads them.

    Scores the validation pairs before: evaluations need their numbers, and margins their scaling.

    Raises:
        UserError: the rewards cannot be calibrated, or too many pairs cannot be scored.
    """
    from madpo_ray.scoring.streamed import StreamedScores

    missing = missing_passes(config)
    if missing:
        score(config, missing, notes, (columns.VALIDATION,))

    sources = tuple(config.reward.source_columns) if reward.uses_rewards(config) else ()
    streamed = StreamedScores(
        kept=kept_folder(config),
        actors=config.actors,
        batch_size=config.scoring.batch_size,
        scorers=tuple(one.scorer for one in missing),
        finished=tuple(one.rows for one in passes_of(config) if one.is_finished()),
        source_columns=sources,
        max_reject_fraction=config.data.max_reject_fraction,
    )
    if not reward.uses_rewards(config):
        return streamed

    own = read_split(pairs.STAGE.rows(config), columns.VALIDATION, [columns.PAIR_ID, *sources])
    report = calibration(streamed.stored(own), config)
    return dataclasses.replace(streamed, scaling=scaling(report, config))


def calibration(scores: pa.Table, config: Config) -> dict[str, Any]:
    """How well calibrated the margins of the validation pairs are.

    Args:
        scores: of validation pairs, in the reward's own units; NaN for pairs that failed.

    Raises:
        UserError: every pair failed.
    """
    from madpo_ray.scoring.calibration import calibration_report
    from madpo_ray.scoring.streamed import margins_of

    margins = margins_of(scores).to_numpy()
    margins = margins[~np.isnan(margins)]
    if not len(margins):
        raise UserError(
            "none of the validation pairs could be scored, so nothing is known of the margins: see "
            "the reasons in rejects.parquet of stage margins, or raise data.validation_fraction"
        )
    return calibration_report(margins, config.margins.calibration)


def scaling(report: Mapping[str, Any], config: Config) -> "Scaling":
    """What makes margins calibrated, by a report of `calibration`.

    Raises:
        UserError: nothing could be fitted.
    """
    from madpo_ray.scoring.scaling import Scaling

    if config.margins.calibration == "none":
        return Scaling()
    if "reason" in report:
        raise UserError(
            f"the margins cannot be calibrated: {report['reason']}. margins.calibration: none uses "
            "them as they are"
        )
    return Scaling(report.get("temperature", 1.0), tuple(report.get("knots", ())))
