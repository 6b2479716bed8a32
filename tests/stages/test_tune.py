"""The search: real trials on stored margins, and a config to train with at the end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from madpo_ray import pipeline
from madpo_ray.config import Config, load_config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import train, tune


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
def test_search_over_finished_margins(finished_run: tuple[Config, Any], tmp_path: Path) -> None:
    """In a process of its own.

    Tune needs a Ray with the dashboard's state API, which the tests' shared one omits.
    """
    config, _ = finished_run
    raw = config.model_dump(mode="json")
    raw["tune"]["num_samples"] = 2
    # Beta far apart and a high rate, so that the trials differ.
    raw["train"] |= {"max_steps": 4, "eval_steps": 2, "learning_rate": 1e-2}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    program = Path(sys.executable).with_name("madpo-ray")
    command = [program, "tune", "--config", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials, 0 failed; best eval_rewards/accuracies" in done.stdout

    folder = tune.STAGE.folder(config)
    trials = json.loads((folder / "trials.json").read_text())
    assert [sorted(trial["values"]) for trial in trials] == [["beta", "c_max", "c_min"]] * 2
    assert trials[0]["values"] != trials[1]["values"]
    best = load_config(folder / "best.yaml")
    winner = max(trials, key=lambda trial: trial[tune.METRIC])
    assert {key: getattr(best.train, key) for key in winner["values"]} == winner["values"]

    # Only section train differs, so training with it uses the margins as they are.
    assert [stage.name for stage in pipeline.pending(best)] == ["train", "evaluate"]
    assert train.STAGE.inputs(best) != train.STAGE.inputs(config)


def test_ranges_within_bounds(raw_config: dict[str, Any]) -> None:
    raw_config["tune"] = {"search_space": {"c_min": {"min": 0.1, "max": 1.0}}}
    with pytest.raises(UserError, match=r"tune\.search_space\.c_min: must be strictly between"):
        tune.STAGE.check(parse_config(raw_config))


def test_concurrent_trials_fit(raw_config: dict[str, Any]) -> None:
    raw_config["tune"] = {"max_concurrent_trials": 500}
    with pytest.raises(UserError, match="500 trials of 2 workers do not fit"):
        tune.STAGE.check(parse_config(raw_config))


def test_best_trial_has_the_highest_accuracy() -> None:
    """A failed one does not count, nor one without an evaluation."""
    trials = [
        {"values": {"beta": 0.1}, tune.METRIC: 0.6},
        {"values": {"beta": 0.2}, tune.METRIC: 0.8},
        {"values": {"beta": 0.3}, tune.METRIC: 0.8},
        {"values": {"beta": 0.4}, tune.METRIC: 0.9, "error": "out of memory"},
        {"values": {"beta": 0.5}},
    ]
    assert tune.best_trial(trials)["values"] == {"beta": 0.2}
    with pytest.raises(RuntimeError, match="no trial was evaluated"):
        tune.best_trial(trials[3:])
