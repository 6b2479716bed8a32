"""Charts of trainings: each metric over the steps, in training and in evaluation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from madpo_ray.evaluation.charts import BELOW, HEIGHT, WIDTH, Rows, chart_data

MAX_POINTS = 300  # of a line

# What is drawn, by title: names of metrics; those of an evaluation begin with eval_.
CURVES = {
    "Loss": ("loss",),
    "Accuracy": ("accuracy", "rewards/accuracies"),
    "Margin": ("margin", "rewards/margins"),
    "Weights": ("weight/mean", "weight/effective_sample_size"),
    "Gradient norm": ("grad_norm",),
    "Pairs per second": ("pairs_per_second",),
}


def training_charts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[alt.Chart]:
    """One chart for each kind of metric that was logged.

    Args:
        runs: lines of metrics, by the name of the run.
    """
    charts = []
    for title, names in CURVES.items():
        rows = [row for run, lines in runs.items() for row in _points(run, lines, names)]
        if rows:
            charts.append(_curves(title, rows, several=len(runs) > 1))
    return charts


def _points(run: str, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    found: Rows = []
    for name in names:
        for key in (name, f"eval_{name}"):
            own = [line for line in lines if line.get(key) is not None]
            found += [
                {"run": run, "metric": key, "step": line["step"], "value": line[key]}
                for line in _thinned(own)
                if math.isfinite(line[key])
            ]
    return found


def _thinned(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most so many lines at equal distances, with the last one."""
    distance = math.ceil(len(lines) / MAX_POINTS) or 1
    return [*lines[:-1:distance], *lines[-1:]]


def _curves(title: str, rows: Rows, *, several: bool) -> alt.Chart:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))  # training before evaluation
    encoding: dict[str, Any] = {
        "x": alt.X("step:Q", title="optimizer step"),
        "y": alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        "color": alt.Color("metric:N", title=None, scale=alt.Scale(domain=metrics), legend=BELOW),
        "tooltip": ["run:N", "metric:N", "step:Q", "value:Q"],
    }
    if several:
        encoding["strokeDash"] = alt.StrokeDash("run:N", title=None, legend=BELOW)
    chart: alt.Chart = (
        alt.Chart(chart_data(rows))
        .mark_line(point=len(rows) < 2 * MAX_POINTS)
        .encode(**encoding)
        .properties(width=WIDTH, height=HEIGHT, title=title)
    )
    return chart
