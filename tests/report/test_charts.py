"""Curves of trainings."""

from madpo_ray.report.charts import MAX_POINTS, training_charts
from support.pages import require_drawn

LINES = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in range(1, 2001)]
LINES[-1] |= {"eval_loss": 0.5, "weight/mean": 1.1}


def test_one_chart_for_each_kind_of_metric() -> None:
    found = training_charts({"run": LINES})
    assert [chart.title for chart in found] == ["Loss", "Weights", "Gradient norm"]
    require_drawn({str(chart.title): chart for chart in found})


def test_long_trainings_are_thinned() -> None:
    """The last step is kept, and so is every evaluation that there is."""
    points = training_charts({"run": LINES})[0].to_dict()["data"]["values"]
    steps = [point["step"] for point in points if point["metric"] == "loss"]
    assert len(steps) <= 1.2 * MAX_POINTS
    assert steps[-1] == 2000
    assert [point["value"] for point in points if point["metric"] == "eval_loss"] == [0.5]


def test_runs_share_a_chart() -> None:
    chart = training_charts({"a": LINES[:3], "b": LINES[:3]})[0].to_dict()
    assert chart["encoding"]["strokeDash"]["field"] == "run"
    assert {point["run"] for point in chart["data"]["values"]} == {"a", "b"}
