"""The sections of a report: tables and charts, each from what the run's folder holds."""

from collections.abc import Sequence
from typing import Any

from madpo_ray.columns import TEXT_COLUMNS
from madpo_ray.report.charts import training_charts
from madpo_ray.report.collect import Run
from madpo_ray.report.parts import Section, Table, cell, content_text, or_dash, plain
from madpo_ray.report.results import evaluation_section, margins_section, samples_section
from madpo_ray.search.charts import search_charts


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """All sections that have something to show."""
    found = [_pipeline(runs), _configs(runs), _trainings(runs)]
    for run in runs:
        suffix = f" of {run.name}" if len(runs) > 1 else ""
        found += [
            margins_section(run, suffix),
            evaluation_section(run, suffix),
            samples_section(run, suffix),
            _search(run, suffix),
            _suspicious(run, suffix),
            _rejects(run, suffix),
        ]
    return [section for section in found if section]


def _pipeline(runs: Sequence[Run]) -> Section:
    headings = ["stage", "seconds", "rows", "result"]
    rows: list[list[Any]] = [
        [
            run.name,
            stage.name,
            or_dash(stage.seconds),
            or_dash(stage.rows),
            "\n".join(stage.lines),
        ]
        for run in runs
        for stage in run.stages
    ]
    if len(runs) > 1:
        headings.insert(0, "run")
    else:
        rows = [row[1:] for row in rows]
    note = (
        "Seconds are those of a stage's last start: what was resumed took longer. Rows are what it "
        "wrote; of a training, the training pairs."
    )
    return Section("Pipeline", note=note, tables=[Table(headings, rows)])


def _configs(runs: Sequence[Run]) -> Section:
    """What differs between the runs, and every key."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: [plain(run.config.get(key)) for run in runs] for key in keys}
    different = [(key, *own) for key, own in values.items() if len(set(own)) > 1]
    headings = ("key", *(run.name for run in runs))
    libraries = list(dict.fromkeys(name for run in runs for name in run.versions))
    versions = [(name, *(or_dash(run.versions.get(name)) for run in runs)) for name in libraries]
    of_runs = [run.name for run in runs] if len(runs) > 1 else ["version"]
    tables = [
        Table(headings, different, title="Keys that differ"),
        Table(headings, [(key, *own) for key, own in values.items()], "All keys", is_folded=True),
        Table(("library", *of_runs), versions, "Versions", is_folded=True),
    ]
    return Section("Config", tables=tables)


def _trainings(runs: Sequence[Run]) -> Section:
    """Curves of each training; runs share a chart."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    charts = []
    for name in names:
        lines = {run.name: run.metrics[name] for run in runs if name in run.metrics}
        for chart in training_charts(lines):
            charts.append(chart.properties(title=f"{name}: {chart.title}"))
    return Section("Training", charts=charts)


def _search(run: Run, suffix: str) -> Section:
    found = run.search
    if not found:
        return Section("Search")
    trials = found["trials"]
    headings = list(dict.fromkeys(key for trial in trials for key in trial))
    rows = [[or_dash(cell(trial.get(key))) for key in headings] for trial in trials]
    charts = search_charts(trials, found["keys"], found["objectives"][0], found["importances"])
    return Section(
        f"Search{suffix}", tables=[Table(headings, rows, "Trials")], charts=list(charts.values())
    )


def _suspicious(run: Run, suffix: str) -> Section:
    rows = [
        (one["margin"], one["weight"], *(content_text(one[column]) for column in TEXT_COLUMNS))
        for one in run.suspicious
    ]
    return Section(
        f"Suspicious pairs{suffix}",
        note="The training pairs whose labels the rewards contradict most.",
        tables=[Table(("margin", "weight", *TEXT_COLUMNS), rows)],
    )


def _rejects(run: Run, suffix: str) -> Section:
    headings = list(dict.fromkeys(key for row in run.rejects for key in row))
    rows = [[or_dash(cell(row.get(key))) for key in headings] for row in run.rejects]
    total = sum(run.num_rejects.values())
    note = f"The first of {total:,}." if total > len(rows) else ""
    return Section(f"Rejected rows{suffix}", note=note, tables=[Table(headings, rows)])
