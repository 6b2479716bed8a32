"""Charts of a search, of trials with numbers, choices and failures."""

from madpo_ray.search.charts import search_charts
from support.pages import require_drawn

ACCURACY = "eval_rewards/accuracies"


def test_every_chart_is_drawn() -> None:
    trials = [
        {
            "trial": number,
            "state": "stopped" if number % 3 == 2 else "complete",
            "train.beta": 0.01 * 10 ** (number % 4),
            "train.loss_type": ["madpo", "sigmoid"][number % 2],
            ACCURACY: 0.5 + 0.01 * number,
        }
        for number in range(1, 9)
    ]
    trials.append({"trial": 9, "state": "failed", "train.beta": 0.1, "train.loss_type": "madpo"})
    keys = ["train.beta", "train.loss_type"]
    found = search_charts(trials, keys, ACCURACY, {"train.beta": 0.8, "train.loss_type": 0.2})
    assert list(found) == ["history", *keys, "parallel", "importance"]
    require_drawn(found)
    assert "importance" not in search_charts(trials, keys, ACCURACY, {})


def test_one_trial_is_enough() -> None:
    trials = [{"trial": 1, "state": "complete", "train.beta": 0.1, ACCURACY: 0.5}]
    require_drawn(search_charts(trials, ["train.beta"], ACCURACY, {}))


def test_error_bars_are_of_seeds_only() -> None:
    """Trials that differ in another key, or in nothing, say nothing of noise."""
    trials = [
        {"trial": 1, "state": "complete", "train.beta": 0.1, "train.tau": 1.0, ACCURACY: 0.5},
        {"trial": 2, "state": "complete", "train.beta": 0.1, "train.tau": 2.0, ACCURACY: 0.7},
        {"trial": 3, "state": "complete", "train.beta": 0.1, "train.tau": 2.0, ACCURACY: 0.7},
    ]
    chart = search_charts(trials, ["train.beta", "train.tau"], ACCURACY, {})["train.beta"]
    assert len(chart.to_dict()["layer"]) == 1


def test_seeds_have_an_error_bar() -> None:
    trials = [
        {"trial": 1, "state": "complete", "train.beta": 0.1, "run.seed": 0, ACCURACY: 0.5},
        {"trial": 2, "state": "complete", "train.beta": 0.1, "run.seed": 1, ACCURACY: 0.7},
    ]
    charts = search_charts(trials, ["train.beta", "run.seed"], ACCURACY, {})
    chart = charts["train.beta"].to_dict()
    (bar,) = chart["layer"][0]["data"]["values"]
    assert bar["value"] == 0.1
    assert round(bar["low"], 6) == 0.5  # mean 0.6, standard error 0.1
    assert round(bar["high"], 6) == 0.7
