"""Charts of margins and samples. `save_picture` writes one as a PNG file; the report shows it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

Chart = alt.LayerChart | alt.FacetChart  # the types of alt.layer
Rows = list[dict[str, Any]]

BLUE = "#4477aa"
RED = "#cc6677"
GRAY = "#999999"
WIDTH = 560  # pixels
HEIGHT = 320
BELOW = alt.Legend(orient="bottom", columns=2, labelLimit=0)  # leaves the width to the chart
ACCURACY = "share of pairs whose margin is positive"
SCALE = 1.5  # pixels of a picture per pixel of its chart


def save_picture(chart: alt.TopLevelMixin, file: Path) -> None:
    """Writes the chart as a PNG file."""
    file.write_bytes(picture(chart))


def picture(chart: alt.TopLevelMixin) -> bytes:
    """The chart as a PNG image."""
    image: bytes = vl_convert.vegalite_to_png(chart.to_dict(), scale=SCALE)
    return image


def chart_data(values: Rows) -> alt.Data:
    """Rows as the data of a chart."""
    return alt.Data(values=values)  # type: ignore[no-untyped-call]


def histogram_chart(report: Mapping[str, Any]) -> Chart:
    """The histogram of the training pairs' margins, with the curve of the weight over it.

    Args:
        report: as stage margins writes it.
    """
    histogram = report["histogram"]
    edges = histogram["edges"]
    bins = [
        {"from": low, "to": high, "pairs": count}
        for low, high, count in zip(edges[:-1], edges[1:], histogram["pairs"], strict=True)
    ]
    curve = report["weight_curve"]
    points = [
        {"margin": margin, "weight": weight}
        for margin, weight in zip(curve["margin"], curve["weight"], strict=True)
    ]
    is_raw = report["calibration"].get("method") == "none"
    title = "margin, as it was scored" if is_raw else "margin, in calibrated units"
    bars = (
        alt.Chart(chart_data(bins))
        .mark_bar(color=BLUE, binSpacing=0)
        .encode(
            x=alt.X("from:Q", title=title, bin=alt.BinParams(binned=True)),
            x2="to:Q",
            y=alt.Y("pairs:Q", title="training pairs"),
            tooltip=["from:Q", "to:Q", "pairs:Q"],
        )
    )
    line = (
        alt.Chart(chart_data(points))
        .mark_line(color=RED)
        .encode(
            x=alt.X("margin:Q", title=title),
            y=alt.Y("weight:Q", title="weight of a pair", axis=alt.Axis(titleColor=RED)),
        )
    )
    chart = alt.layer(bars, line).resolve_scale(y="independent")
    return _sized(chart, "Margins, and MADPO's weight")


def reliability_chart(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> Chart:
    """How often the sign is right at each confidence, before and after calibration.

    Args:
        before, after: bins, as `scoring.calibration.reliability` gives them.
    """
    names = ("before calibration", "after")
    rows = [
        {"margins": name, "confidence": one["confidence"], **_accuracy(one)}
        for name, bins in zip(names, (before, after), strict=True)
        for one in bins
    ]
    ends = [{"confidence": end, "accuracy": end} for end in (0.5, 1.0)]
    diagonal = (
        alt.Chart(chart_data(ends))
        .mark_line(color=GRAY, strokeDash=[4, 4])
        .encode(x="confidence:Q", y="accuracy:Q")
    )
    scale = alt.Scale(domain=[0.5, 1])
    x = alt.X("confidence:Q", title="confidence: sigmoid(|margin|)", scale=scale)
    colors = alt.Scale(domain=list(names), range=[RED, BLUE])
    series = alt.Color("margins:N", title=None, scale=colors, legend=BELOW)
    points = _with_errors(rows, x, "accuracy", ACCURACY, series)
    title = "Reliability of the margins' signs, validation pairs"
    return _sized(alt.layer(diagonal, *points), title)


def accuracy_chart(bins: Sequence[Mapping[str, Any]], split: str) -> Chart:
    """How often the sign is right by size of the margin.

    Args:
        bins: as `scoring.report.accuracy_by_margin` gives them.
    """
    rows = [
        {"margin": _bin_name(number, one), "expected": one["expected"], **_accuracy(one)}
        for number, one in enumerate(bins, start=1)
    ]
    order = [row["margin"] for row in rows]
    x = alt.X("margin:O", title="|margin|; equally many pairs each", sort=order)
    points = _with_errors(rows, x, "accuracy", ACCURACY, alt.value(BLUE))
    expected = (
        alt.Chart(chart_data(rows))
        .mark_tick(color=GRAY, thickness=2)
        .encode(x=x, y="expected:Q", tooltip=["expected:Q"])
    )
    title = f"Accuracy of the margin's sign, {split} pairs; gray: if calibrated"
    return _sized(alt.layer(expected, *points), title)


def _bin_name(number: int, one: Mapping[str, Any]) -> str:
    """Its bounds; with its number, since bounds may repeat."""
    return f"{number}: {one['from']:.2g} to {one['to']:.2g}"


def margin_charts(report: Mapping[str, Any]) -> dict[str, Chart]:
    """All charts of stage margins, by name."""
    calibration = report["calibration"]
    before = calibration["reliability_before"]
    after = calibration.get("reliability_after", [])
    by_margin = report["accuracy_by_margin"]
    return {
        "margins": histogram_chart(report),
        "reliability": reliability_chart(before, after),
        "accuracy": accuracy_chart(by_margin["bins"], by_margin["split"]),
    }


def rewards_chart(entries: Sequence[Mapping[str, Any]]) -> Chart:
    """The mean reward of each policy's samples by temperature, with its interval.

    Args:
        entries: as `samples.describe_samples` gives them, of judged samples.
    """
    rows = [_judged(entry) for entry in entries]
    x = alt.X("temperature:Q", title="temperature of decoding")
    series = alt.Color("policy:N", title=None, legend=BELOW)
    points = _with_errors(rows, x, "reward", "reward, 95 % interval over prompts", series)
    line = alt.Chart(chart_data(rows)).mark_line().encode(x=x, y="reward:Q", color=series)
    return _sized(alt.layer(line, *points), "Mean reward of samples")


def frontier_chart(entries: Sequence[Mapping[str, Any]]) -> Chart:
    """The mean reward against the divergence from the reference; the frontier is connected."""
    rows = [_judged(entry) for entry in entries]
    x = alt.X("kl:Q", title="KL(policy || reference), nats per response; numbers: temperature")
    points = _with_errors(
        rows,
        x,
        "reward",
        "reward, 95 % interval over prompts",
        alt.Color("policy:N", title=None, legend=BELOW),
    )
    best = [row for row in rows if row["on_frontier"]]
    line = alt.Chart(chart_data(best)).mark_line(color=GRAY).encode(x=x, y="reward:Q")
    labels = (
        alt.Chart(chart_data(rows))
        .mark_text(align="left", dx=6, dy=-6)
        .encode(x=x, y="reward:Q", text=alt.Text("temperature:Q", format="~g"))
    )
    return _sized(alt.layer(line, *points, labels), "Reward against divergence")


def _judged(entry: Mapping[str, Any]) -> dict[str, Any]:
    reward = entry["reward"]
    low, high = reward["interval"] or (reward["mean"], reward["mean"])
    names = ("policy", "temperature", "kl", "on_frontier")
    return {
        **{name: entry[name] for name in names},
        "reward": reward["mean"],
        "low": low,
        "high": high,
    }


def _accuracy(one: Mapping[str, Any]) -> dict[str, float]:
    low, high = one["interval"]
    return {"accuracy": one["accuracy"], "low": low, "high": high}


def _with_errors(rows: Rows, x: alt.X, name: str, title: str, color: Any) -> list[alt.Chart]:
    """Points with their intervals, `low` to `high`."""
    base = alt.Chart(chart_data(rows)).encode(x=x, color=color)
    scale = alt.Scale(zero=False)
    bars = base.mark_rule().encode(y=alt.Y("low:Q", scale=scale, title=title), y2="high:Q")
    points = base.mark_point(filled=True, size=50).encode(
        y=alt.Y(f"{name}:Q", scale=scale, title=title), tooltip=[f"{name}:Q", "low:Q", "high:Q"]
    )
    return [bars, points]


def _sized(chart: Chart, title: str) -> Chart:
    return chart.properties(width=WIDTH, height=HEIGHT, title=title)
