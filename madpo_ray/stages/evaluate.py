"""Stage evaluate: what the training did, on the test split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from madpo_ray import columns
from madpo_ray.artifacts.tables import column_names, read_split
from madpo_ray.atomic import write_csv, write_json
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, pairs, train
from madpo_ray.stages.other_runs import (
    check_runs,
    require_same_tokens,
    require_unseen_pairs,
    runs_content,
)
from madpo_ray.stages.policy_samples import (
    SAMPLES_PER_PROMPT,
    check_prompts,
    draw_samples,
    judge_of,
    policies_of,
    sample_scorers,
)
from madpo_ray.stages.sft import initial_policy, stages_before_policy
from madpo_ray.stages.stage import Build, Description, Stage

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

SAMPLES = "samples.parquet"


def _settings(config: Config) -> dict[str, Any]:
    # The content of a judge and of other runs counts, not where they are.
    evaluated = config.evaluate.fingerprinted()
    for name in ("judge", "judge_revision", "compare_with"):
        del evaluated[name]
    judge = judge_of(config)
    return {
        "seed": config.run.seed,
        "evaluate": evaluated,
        "judge": None if judge is None else judge.settings(),
    }


def _upstream(config: Config) -> tuple[Stage, ...]:
    return (*stages_before_policy(config), margins.STAGE, train.STAGE)


def _content(config: Config) -> dict[str, Any]:
    """Hashes of the judge and of the other runs' policies."""
    found: dict[str, Any] = dict(runs_content(config))
    judge = judge_of(config)
    if judge is not None:
        found["judge"] = judge.content()
    return found


def _names(config: Config) -> dict[str, Any]:
    """Where the config finds them."""
    return config.evaluate.model_dump(
        mode="json", include={"judge", "judge_revision", "compare_with"}
    )


def _check(config: Config) -> None:
    """Raises UserError if a judge, another run or the test pairs are missing."""
    data = config.data
    is_empty = data.split_column is None and data.test_fraction == 0
    is_known = pairs.STAGE.is_finished(config)
    if is_known:
        is_empty = pairs.STAGE.require(config)["pairs"][columns.TEST] == 0
    if is_empty:
        raise UserError(
            "split test has no pairs to evaluate on: set data.test_fraction or data.split_column "
            "(or stop before it: madpo-ray run --until train)"
        )
    judge = judge_of(config)
    if judge is not None:
        judge.check()
    check_runs(config)
    if is_known:
        require_unseen_pairs(config)
        check_prompts(config, judge, columns.TEST)


def make(build: Build) -> dict[str, Any]:
    """Writes `evaluation.json`: accuracies, rank correlations, and samples in numbers and to read.

    Also `samples.parquet` (all samples), `samples.csv` (their numbers) and pictures.
    """
    results = _preferences(build) | _samples(build)
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
    content=_content,
    names=_names,
    check=_check,
    check_upstream=require_same_tokens,
    make=make,
    describe=describe,
)


def _test_pairs(config: Config) -> pa.Table:
    rows = margins.STAGE.rows(config)
    names = [
        columns.PAIR_ID,
        columns.PROMPT,
        columns.GROUP_HASH,
        *columns.TOKEN_COLUMNS,
        *columns.REF_LOGPS,
        *config.score_columns,
    ]
    if columns.MARGIN in column_names(rows):
        names.append(columns.MARGIN)
    return read_split(rows, columns.TEST, names)


def _preferences(build: Build) -> dict[str, Any]:
    """How often policy, reference and reward model prefer the chosen response."""
    from madpo_ray.evaluation.measures import preference_metrics
    from madpo_ray.scoring.actors import score_table
    from madpo_ray.scoring.scorers import PolicyLogps

    config = build.config
    scorer = PolicyLogps(
        train.STAGE.model(config),
        config.model,
        base=initial_policy(config),
        columns=columns.POLICY_LOGPS,
        forward=config.scoring.forward,
    )
    batch_size = config.scoring.batch_size
    test = _test_pairs(config)
    scored = score_table(test, [scorer], config.actors, batch_size=batch_size, notes=build.notes)
    return preference_metrics(scored, config.score_columns)


def _samples(build: Build) -> dict[str, Any]:
    """Samples of all policies in numbers, and some of two of them to read."""
    import pyarrow.parquet as pq

    from madpo_ray.evaluation.sample_sets import POLICY, REFERENCE, SampleSet
    from madpo_ray.evaluation.samples import compare_with_others, describe_samples, flat_entry
    from madpo_ray.scoring.actors import score_table

    # Draw them.
    config = build.config
    policies = policies_of(config)
    temperatures = config.evaluate.temperatures
    sets = [SampleSet(policy, temperature) for policy in policies for temperature in temperatures]
    table = draw_samples(policies, build)

    # Score them.
    scorers = sample_scorers(config, sets, policies)
    batch_size = config.scoring.batch_size
    table = score_table(table, scorers, config.actors, batch_size=batch_size, notes=build.notes)

    # Numbers, tables and pictures.
    num_prompts = table.num_rows // SAMPLES_PER_PROMPT
    entries = describe_samples(table, sets, num_prompts=num_prompts)
    pq.write_table(table, build.folder / SAMPLES)
    write_csv(build.folder / "samples.csv", list(map(flat_entry, entries)))
    _draw_pictures(build.folder / "pictures", entries)
    shown = table.slice(0, min(config.evaluate.num_shown, num_prompts))
    before, after = (SampleSet(name, temperatures[0]).text for name in (REFERENCE, POLICY))
    return {
        "sampling": entries,
        "comparisons": compare_with_others(table, sets, num_prompts=num_prompts),
        "samples": {"before": shown[before].to_pylist(), "after": shown[after].to_pylist()},
    }


def _draw_pictures(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Rewards by temperature, and against divergence, if samples were judged."""
    from madpo_ray.evaluation.charts import frontier_chart, rewards_chart, save_picture

    judged = [entry for entry in entries if "reward" in entry]
    if judged:
        folder.mkdir()
        save_picture(rewards_chart(judged), folder / "reward_by_temperature.png")
        save_picture(frontier_chart(judged), folder / "frontier.png")
