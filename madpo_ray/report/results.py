"""The report's sections about margins, evaluation and samples."""

from collections.abc import Mapping
from typing import Any

from madpo_ray.artifacts.manifest import flat
from madpo_ray.columns import PROMPT
from madpo_ray.evaluation.charts import frontier_chart, margin_charts, rewards_chart
from madpo_ray.evaluation.sample_sets import SampleSet
from madpo_ray.evaluation.terminal import RANKINGS
from madpo_ray.report.collect import Run
from madpo_ray.report.parts import (
    Section,
    Table,
    content_text,
    number_or_none,
    or_dash,
    plain,
    shorten,
)
from madpo_ray.search.outcomes import format_values


def margins_section(run: Run, suffix: str) -> Section:
    """Charts and tables of margins and weights."""
    report = run.margins
    if not report:
        return Section("Margins")
    calibration = report["calibration"]
    weights_at = format_values(report["weights_at"])
    splits = [
        (
            split,
            own["pairs"],
            own.get("mean", "-"),
            own.get("negative_fraction", "-"),
            own.get("weight", {}).get("mean", "-"),
            own.get("weight", {}).get("effective_sample_size", "-"),
        )
        for split, own in report["splits"].items()
    ]
    headings = ("split", "pairs", "mean margin", "share below 0", "mean weight", "effective pairs")
    labels = [
        (label, one["pairs"], one["mean_weight"])
        for label, one in report["weights_by_label"].items()
    ]
    counts = [(key, plain(value)) for key, value in flat(report["counts"]).items()]
    errors = [
        (key, number_or_none(value))
        for key, value in calibration.items()
        if number_or_none(value) is not None
    ]
    return Section(
        f"Margins{suffix}",
        note="A weight above 1 amplifies a pair's loss. If margins are calibrated, the mean weight "
        f"of pairs below tau is 1. Weights at {weights_at}, as when the pairs were scored.",
        tables=[
            Table(headings, splits, "Margins and weights by split"),
            Table(("label", "pairs", "mean weight"), labels, "Weights by the true scores"),
            Table(("calibration", "value"), errors, "Calibration"),
            Table(("pairs", "count"), counts, "Counts", is_folded=True),
        ],
        charts=list(margin_charts(report).values()),
    )


def evaluation_section(run: Run, suffix: str) -> Section:
    """Preferences and samples in numbers."""
    results = run.evaluation
    if not results:
        return Section("Evaluation")
    rankings = [
        (
            label,
            results[key]["accuracy"],
            *results[key]["accuracy_interval"],
            or_dash(results[key].get("rank_correlation")),
        )
        for key, label in RANKINGS.items()
        if key in results
    ]
    bins = [
        (f"{one['from']:.3g} to {one['to']:.3g}", one["pairs"], one["accuracy"], *one["interval"])
        for one in results["implicit"].get("by_margin", [])
    ]
    judged = [entry for entry in results["sampling"] if "reward" in entry]
    charts = [rewards_chart(judged), frontier_chart(judged)] if judged else []
    return Section(
        f"Evaluation{suffix}",
        note="On the test split. Intervals are of 95 %. KL is of a policy as it is decoded against "
        "the reference at temperature 1: at another temperature the reference has one, too.",
        tables=[
            Table(RANKING_HEADINGS, rankings, "Which response is preferred"),
            Table(
                ("|margin|", "pairs", "accuracy", "from", "to"),
                bins,
                "Accuracy of the policy's implicit reward by size of the margin",
            ),
            Table(
                SAMPLE_HEADINGS,
                [_sampled(one) for one in results["sampling"]],
                "Samples in numbers",
            ),
            Table(
                COMPARED_HEADINGS,
                [_compared(one) for one in results["comparisons"]],
                "This policy against others, paired by prompt",
            ),
        ],
        charts=charts,
    )


RANKING_HEADINGS = (
    "ranked by",
    "accuracy",
    "from",
    "to",
    "rank correlation with true margin",
)


SAMPLE_HEADINGS = (
    "policy",
    "temperature",
    "reward",
    "from",
    "to",
    "wins against reference",
    "at equal length",
    "KL to reference, nats",
    "standard error of KL",
    "tokens",
    "distinct bigrams",
)


COMPARED_HEADINGS = (
    "against",
    "temperature",
    "reward difference",
    "from",
    "to",
    "wins",
    "from",
    "to",
    "at equal length",
)


def _sampled(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        entry["policy"],
        entry["temperature"],
        *_interval(entry.get("reward")),
        _interval(entry.get("win_rate"))[0],
        or_dash(entry.get("length_controlled_win_rate")),
        entry["kl"],
        or_dash(entry["kl_standard_error"]),
        entry["tokens"],
        entry["distinct_2"],
    )


def _compared(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        one["against"],
        one["temperature"],
        *_interval(one["reward_difference"]),
        *_interval(one["win_rate"]),
        or_dash(one["length_controlled_win_rate"]),
    )


def _interval(value: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    if value is None:
        return ("-", "-", "-")
    low, high = value["interval"] or ("-", "-")
    return (value["mean"], low, high)


def samples_section(run: Run, suffix: str) -> Section:
    """Samples of all policies for the same prompts, at the first temperature."""
    if run.samples is None:
        return Section("Samples")
    first = run.evaluation["sampling"][0]["temperature"]
    policies = list(dict.fromkeys(entry["policy"] for entry in run.evaluation["sampling"]))
    sets = [SampleSet(policy, first) for policy in policies]
    headings = ["prompt"]
    for one in sets:
        headings.append(one.policy)
        if one.reward in run.samples.column_names:
            headings.append(f"reward ({one.policy})")
    rows = []
    for sample in run.samples.to_pylist():
        row: list[Any] = [content_text(sample[PROMPT])]
        for one in sets:
            row.append(shorten(sample[one.text]))
            if one.reward in sample:
                row.append(sample[one.reward])
        rows.append(row)
    note = f"Decoded at temperature {first:g}."
    return Section(f"Samples{suffix}", note=note, tables=[Table(headings, rows)])
