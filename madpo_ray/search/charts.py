"""Charts of a search: its history, the objective against each key, and which keys matter."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from madpo_ray.config import SEED
from madpo_ray.evaluation.charts import BELOW, BLUE, GRAY, HEIGHT, RED, WIDTH, Rows, chart_data


def search_charts(
    trials: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    objective: str,
    importances: Mapping[str, float],
) -> dict[str, alt.TopLevelMixin]:
    """All charts of a search, by name.

    Args:
        trials: rows, as `outcomes.table_of` gives them.
        keys: dotted keys of the search space.
        objective: the metric's name.
        importances: the share of each key, or empty.
    """
    rows = [dict(row) for row in trials if objective in row]
    if not rows:
        return {}
    charts: dict[str, alt.TopLevelMixin] = {"history": _history(rows, objective)}
    for key in keys:
        charts[key] = _against(rows, key, keys, objective)
    charts["parallel"] = _parallel(rows, keys, objective)
    if importances:
        charts["importance"] = _importance(importances)
    return charts


def _renamed(rows: Rows, objective: str) -> Rows:
    """The objective under a name that Vega reads: others have dots and slashes."""
    return [
        {"trial": row["trial"], "state": row["state"], "objective": row[objective]} for row in rows
    ]


def _state() -> alt.Color:
    return alt.Color(
        "state:N",
        title=None,
        legend=BELOW,
        scale=alt.Scale(domain=["complete", "stopped", "failed"], range=[BLUE, GRAY, RED]),
    )


def _objective(title: str) -> alt.Y:
    return alt.Y("objective:Q", title=title, scale=alt.Scale(zero=False))


def _history(rows: Rows, objective: str) -> alt.TopLevelMixin:
    """Each trial's last value, and the best of the complete ones so far."""
    plain = _renamed(rows, objective)
    complete = [row for row in plain if row["state"] == "complete"]
    values = np.array([row["objective"] for row in complete], dtype=np.float64)
    best = np.maximum.accumulate(values).tolist()
    line = [
        {"trial": row["trial"], "objective": one} for row, one in zip(complete, best, strict=True)
    ]
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(tickMinStep=1))
    points = (
        alt.Chart(chart_data(plain))
        .mark_point(filled=True, size=50)
        .encode(x=x, y=_objective(objective), color=_state(), tooltip=["trial:Q", "objective:Q"])
    )
    so_far = (
        alt.Chart(chart_data(line))
        .mark_line(color=GRAY, interpolate="step-after")
        .encode(x=x, y=_objective(objective))
    )
    return alt.layer(so_far, points).properties(
        width=WIDTH, height=HEIGHT, title="Trials in their order, and the best so far"
    )


def _against(rows: Rows, key: str, keys: Sequence[str], objective: str) -> alt.TopLevelMixin:
    """The objective against a key; bars are standard errors over seeds, if there are several."""
    points = [
        {**plain, "value": row[key]}
        for plain, row in zip(_renamed(rows, objective), rows, strict=True)
    ]
    spread = [] if key == SEED else _spread(rows, key, keys, objective)
    x = _axis([row[key] for row in rows], key)
    dots = (
        alt.Chart(chart_data(points))
        .mark_point(filled=True, size=40)
        .encode(x=x, y=_objective(objective), color=_state(), tooltip=["trial:Q", "objective:Q"])
    )
    layers = [dots]
    if spread:
        bars = alt.Chart(chart_data(spread)).mark_rule(color=BLUE)
        layers.insert(0, bars.encode(x=x, y=alt.Y("low:Q", title=objective), y2="high:Q"))
    return alt.layer(*layers).properties(
        width=WIDTH,
        height=HEIGHT,
        title=f"The objective against {key}"
        + (" (bars: mean and standard error over seeds)" if spread else ""),
    )


def _axis(values: Sequence[Any], key: str) -> alt.X:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return alt.X("value:N", title=key)
    is_wide = min(values) > 0 and max(values) / min(values) > 20
    return alt.X(
        "value:Q", title=key, scale=alt.Scale(type="log" if is_wide else "linear", zero=False)
    )


def _spread(rows: Rows, key: str, keys: Sequence[str], objective: str) -> Rows:
    """Mean and standard error of complete trials that differ in their seeds only."""
    by_settings: dict[str, dict[int, float]] = {}
    value_of: dict[str, Any] = {}
    for row in rows:
        if row["state"] == "complete":
            settings = repr([row[name] for name in keys if name != SEED])
            by_settings.setdefault(settings, {})[row.get(SEED, 0)] = row[objective]
            value_of[settings] = row[key]
    found = []
    for settings, by_seed in by_settings.items():
        if len(by_seed) > 1:
            values = list(by_seed.values())
            mean = float(np.mean(values))
            error = float(np.std(values, ddof=1) / len(values) ** 0.5)
            found.append({"value": value_of[settings], "low": mean - error, "high": mean + error})
    return found


def _parallel(rows: Rows, keys: Sequence[str], objective: str) -> alt.Chart:
    """One line per trial through its values, each key from its least to its greatest."""
    names = [*keys, objective]
    places = {name: _places([row[name] for row in rows]) for name in names}
    lines = [
        {
            "trial": row["trial"],
            "key": name,
            "place": places[name][i],
            "value": str(row[name]),
            "objective": row[objective],
        }
        for i, row in enumerate(rows)
        for name in names
    ]
    chart: alt.Chart = (
        alt.Chart(chart_data(lines))
        .mark_line(point=True, opacity=0.7)
        .encode(
            x=alt.X("key:N", title=None, sort=names, axis=alt.Axis(labelAngle=0)),
            y=alt.Y(
                "place:Q", title="from the least to the greatest value", axis=alt.Axis(labels=False)
            ),
            color=alt.Color("objective:Q", title=objective, scale=alt.Scale(scheme="viridis")),
            detail="trial:N",
            tooltip=["trial:N", "key:N", "value:N", "objective:Q"],
        )
        .properties(width=WIDTH, height=HEIGHT, title="Parallel coordinates of the trials")
    )
    return chart


def _places(values: Sequence[Any]) -> list[float]:
    """Values from 0 to 1 by size, or by order of appearance if they are no numbers."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        order = list(dict.fromkeys(map(repr, values)))
        values = [order.index(repr(value)) for value in values]
    low = min(values)
    span = max(values) - low
    return [(value - low) / span if span else 0.5 for value in values]


def _importance(importances: Mapping[str, float]) -> alt.Chart:
    rows = [{"key": key, "share": share} for key, share in importances.items()]
    chart: alt.Chart = (
        alt.Chart(chart_data(rows))
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X("share:Q", title="share of the objective's spread (functional ANOVA)"),
            y=alt.Y("key:N", title=None, sort="-x"),
            tooltip=["key:N", "share:Q"],
        )
        .properties(width=WIDTH, height=40 * len(rows) + 20, title="Which keys matter")
    )
    return chart
