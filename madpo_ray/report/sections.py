"""The sections of a report: tables and charts, each from what the run's folder holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from madpo_ray.columns import PROMPT, TEXT_COLUMNS
from madpo_ray.data.messages import from_text
from madpo_ray.evaluation.charts import frontier_chart, margin_charts, rewards_chart
from madpo_ray.evaluation.sample_sets import SampleSet
from madpo_ray.evaluation.terminal import RANKINGS
from madpo_ray.report.charts import training_charts
from madpo_ray.report.collect import Run
from madpo_ray.search.charts import search_charts
from madpo_ray.search.outcomes import shown

MAX_TEXT = 600  # characters of a cell


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]  # numbers, and texts
    title: str = ""
    folded: bool = False  # shown when it is opened


@dataclass(frozen=True)
class Section:
    title: str
    note: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: Sequence[alt.TopLevelMixin] = ()

    def __bool__(self) -> bool:
        return any(table.rows for table in self.tables) or bool(self.charts)


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """All sections that have something to show."""
    found = [_pipeline(runs), _configs(runs), _trainings(runs)]
    for run in runs:
        name = f" of {run.name}" if len(runs) > 1 else ""
        found += [
            _margins(run, name),
            _evaluation(run, name),
            _samples(run, name),
            _search(run, name),
            _suspicious(run, name),
            _rejects(run, name),
        ]
    return [section for section in found if section]


def _pipeline(runs: Sequence[Run]) -> Section:
    headings = ["stage", "seconds", "result"]
    rows: list[list[Any]] = [
        [run.name, stage.name, _or_dash(stage.seconds), "\n".join(stage.lines)]
        for run in runs
        for stage in run.stages
    ]
    if len(runs) > 1:
        headings.insert(0, "run")
    else:
        rows = [row[1:] for row in rows]
    note = "Seconds are those of a stage's last start: what was resumed took longer."
    return Section("Pipeline", note=note, tables=[Table(headings, rows)])


def _configs(runs: Sequence[Run]) -> Section:
    """What differs between the runs, and every key."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: [_text(run.config.get(key)) for run in runs] for key in keys}
    different = [(key, *own) for key, own in values.items() if len(set(own)) > 1]
    headings = ("key", *(run.name for run in runs))
    versions = [(name, version) for name, version in runs[0].versions.items()]
    tables = [
        Table(headings, different, title="Keys that differ"),
        Table(headings, [(key, *own) for key, own in values.items()], "All keys", folded=True),
        Table(("library", "version"), versions, "Versions", folded=True),
    ]
    return Section("Config", tables=[table for table in tables if table.rows])


def _trainings(runs: Sequence[Run]) -> Section:
    """Curves of each training; runs share a chart."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    charts = []
    for name in names:
        lines = {run.name: run.metrics[name] for run in runs if name in run.metrics}
        for chart in training_charts(lines):
            charts.append(chart.properties(title=f"{name}: {chart.title}"))
    return Section("Training", charts=charts)


def _margins(run: Run, name: str) -> Section:
    report = run.margins
    if not report:
        return Section("Margins")
    calibration = report["calibration"]
    weights_at = shown(report["weights_at"])
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
    counts = [(key, _text(value)) for key, value in report["counts"].items()]
    errors = [
        (key, _number(value)) for key, value in calibration.items() if _number(value) is not None
    ]
    return Section(
        f"Margins{name}",
        note="A weight above 1 amplifies a pair's loss. If margins are calibrated, the mean weight "
        f"of pairs below tau is 1. Weights at {weights_at}, as when the pairs were scored.",
        tables=[
            Table(headings, splits, "Margins and weights by split"),
            Table(("label", "pairs", "mean weight"), labels, "Weights by the true scores"),
            Table(("calibration", "value"), errors, "Calibration"),
            Table(("pairs", "count"), counts, "Counts", folded=True),
        ],
        charts=list(margin_charts(report).values()),
    )


def _evaluation(run: Run, name: str) -> Section:
    results = run.evaluation
    if not results:
        return Section("Evaluation")
    rankings = [
        (label, results[key]["accuracy"], *results[key]["accuracy_interval"])
        for key, label in RANKINGS.items()
        if key in results
    ]
    bins = [
        (f"{one['from']:.2f} to {one['to']:.2f}", one["pairs"], one["accuracy"], *one["interval"])
        for one in results["implicit"].get("by_margin", [])
    ]
    judged = [entry for entry in results["sampling"] if "reward" in entry]
    charts = [rewards_chart(judged), frontier_chart(judged)] if judged else []
    return Section(
        f"Evaluation{name}",
        note="On the test split. Intervals are of 95 %.",
        tables=[
            Table(("ranked by", "accuracy", "from", "to"), rankings, "Which response is preferred"),
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
                ("against", "temperature", "reward difference", "from", "to", "wins"),
                [_compared(one) for one in results["comparisons"]],
                "This policy against others, paired by prompt",
            ),
        ],
        charts=charts,
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
    "its error",
    "tokens",
    "distinct bigrams",
)


def _sampled(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        entry["policy"],
        entry["temperature"],
        *_interval(entry.get("reward")),
        _interval(entry.get("win_rate"))[0],
        _or_dash(entry.get("length_controlled_win_rate")),
        entry["kl"],
        _or_dash(entry["kl_standard_error"]),
        entry["tokens"],
        entry["distinct_2"],
    )


def _compared(one: Mapping[str, Any]) -> tuple[Any, ...]:
    difference = _interval(one["reward_difference"])
    return (one["against"], one["temperature"], *difference, one["win_rate"]["mean"])


def _interval(value: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    if value is None:
        return ("-", "-", "-")
    low, high = value["interval"] or ("-", "-")
    return (value["mean"], low, high)


def _samples(run: Run, name: str) -> Section:
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
            headings.append(f"its reward ({one.policy})")
    rows = []
    for sample in run.samples.to_pylist():
        row: list[Any] = [_content(sample[PROMPT])]
        for one in sets:
            row.append(_cut(sample[one.text]))
            if one.reward in sample:
                row.append(sample[one.reward])
        rows.append(row)
    note = f"Decoded at temperature {first:g}."
    return Section(f"Samples{name}", note=note, tables=[Table(headings, rows)])


def _search(run: Run, name: str) -> Section:
    found = run.search
    if not found:
        return Section("Search")
    trials = found["trials"]
    headings = list(dict.fromkeys(key for trial in trials for key in trial))
    rows = [[_or_dash(_cell(trial.get(key))) for key in headings] for trial in trials]
    charts = search_charts(trials, found["keys"], found["objectives"][0], found["importances"])
    return Section(
        f"Search{name}", tables=[Table(headings, rows, "Trials")], charts=list(charts.values())
    )


def _suspicious(run: Run, name: str) -> Section:
    rows = [
        (one["margin"], one["weight"], *(_content(one[column]) for column in TEXT_COLUMNS))
        for one in run.suspicious
    ]
    return Section(
        f"Suspicious pairs{name}",
        note="The training pairs whose labels the rewards contradict most.",
        tables=[Table(("margin", "weight", *TEXT_COLUMNS), rows)],
    )


def _rejects(run: Run, name: str) -> Section:
    headings = list(dict.fromkeys(key for row in run.rejects for key in row))
    rows = [[_or_dash(_cell(row.get(key))) for key in headings] for row in run.rejects]
    return Section(f"Rejected rows{name}", tables=[Table(headings, rows)])


def _content(text: str) -> str:
    """A stored text, or its messages with their roles."""
    content = from_text(text)
    if isinstance(content, str):
        return _cut(content)
    return _cut("\n".join(f"{one.get('role')}: {one.get('content')}" for one in content))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


def _cell(value: Any) -> Any:
    return value if _number(value) is not None or value is None else _cut(_text(value))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value
