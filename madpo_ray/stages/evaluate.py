"""Stage evaluate: what the training did, on the test split."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from madpo_ray import columns
from madpo_ray.artifacts.tables import column_names, read_split
from madpo_ray.atomic import write_json
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, pairs, train
from madpo_ray.stages.sft import initial_policy, stages_before_policy
from madpo_ray.stages.stage import Build, Description, Stage

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

SAMPLES_PER_PROMPT = 2


def _settings(config: Config) -> dict[str, Any]:
    return {"seed": config.run.seed, "evaluate": config.evaluate.fingerprinted()}


def _upstream(config: Config) -> tuple[Stage, ...]:
    return (*stages_before_policy(config), margins.STAGE, train.STAGE)


def _check(config: Config) -> None:
    """Raises UserError if there are no pairs to evaluate on, as early as that is known."""
    data = config.data
    is_empty = data.split_column is None and data.test_fraction == 0
    if pairs.STAGE.exists(config) and pairs.STAGE.is_finished(config):
        is_empty = pairs.STAGE.require(config)["pairs"][columns.TEST] == 0
    if is_empty:
        raise UserError(
            "split test has no pairs to evaluate on: set data.test_fraction or data.split_column"
        )


def make(build: Build) -> dict[str, Any]:
    """Writes `evaluation.json`: accuracies, rank correlations, KL, and samples to read."""
    config = build.config
    policy = train.STAGE.model(config)
    reference = initial_policy(config)
    test = _test_pairs(config)
    results = _preferences(test, policy, reference, build)
    results |= _samples(test, policy, reference, build)
    write_json(build.folder / "evaluation.json", results)
    return results


def describe(results: Mapping[str, Any]) -> Description:
    """Tables of numbers and samples."""
    from madpo_ray.evaluation.terminal import evaluation_tables

    return evaluation_tables(results)


STAGE = Stage(
    name="evaluate",
    help="Compare the policy with the reference on the test split.",
    settings=_settings,
    upstream=_upstream,
    check=_check,
    make=make,
    describe=describe,
)


def _test_pairs(config: Config) -> pa.Table:
    rows = margins.STAGE.rows(config)
    names = [columns.PAIR_ID, *columns.TOKEN_COLUMNS, *columns.REF_LOGPS, *config.score_columns]
    if columns.MARGIN in column_names(rows):
        names.append(columns.MARGIN)
    return read_split(rows, columns.TEST, names)


def _preferences(test: pa.Table, policy: Path, reference: Path, build: Build) -> dict[str, Any]:
    """How often policy, reference and reward model prefer the chosen response."""
    from madpo_ray.evaluation.measures import preference_metrics
    from madpo_ray.scoring.actors import score_table
    from madpo_ray.scoring.scorers import PolicyLogps

    config = build.config
    scorer = PolicyLogps(
        policy,
        config.model,
        base=reference,
        columns=columns.POLICY_LOGPS,
        **config.scoring.forward_limits,
    )
    batch_size = config.scoring.batch_size
    scored = score_table(test, [scorer], config.actors, batch_size=batch_size, notes=build.notes)
    return preference_metrics(scored, config.score_columns)


def _samples(test: pa.Table, policy: Path, reference: Path, build: Build) -> dict[str, Any]:
    """KL(policy || reference) from the policy's own samples, and samples of both to read."""
    from madpo_ray.evaluation.measures import divergence
    from madpo_ray.evaluation.sampling import sample_responses
    from madpo_ray.scoring.actors import score_table
    from madpo_ray.scoring.scorers import PolicyLogps

    # Prompts drawn at random, each sampled twice.
    config = build.config
    settings = config.evaluate
    rng = random.Random(config.run.seed)
    num_prompts = math.ceil(settings.num_samples / SAMPLES_PER_PROMPT)
    drawn = [rng.randrange(test.num_rows) for _ in range(num_prompts)]
    prompts = test.select([columns.PAIR_ID, columns.PROMPT_IDS]).take(drawn * SAMPLES_PER_PROMPT)
    sampled = sample_responses(
        prompts,
        config.actors,
        batch_size=settings.generation_batch_size,
        notes=build.notes,
        model=config.model,
        policies={"after": policy, "before": reference},
        base=reference,
        max_new_tokens=settings.max_new_tokens,
        seed=config.run.seed,
    )

    # Log-probs of the policy's samples under both.
    scorers = [
        PolicyLogps(
            folder,
            config.model,
            base=reference,
            columns=(name,),
            **config.scoring.forward_limits,
            responses=("after_ids",),
        )
        for name, folder in (("policy_logps", policy), ("ref_logps", reference))
    ]
    batch_size = config.scoring.batch_size
    scored = score_table(sampled, scorers, config.actors, batch_size=batch_size, notes=build.notes)

    shown = sampled.slice(0, settings.num_shown)
    return {
        **divergence(scored, "policy_logps", "ref_logps"),
        "samples": {name: shown[name].to_pylist() for name in ("before", "after")},
    }
