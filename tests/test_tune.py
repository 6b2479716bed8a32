"""The search: real trials on stored margins, and a config to train with at the end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from madpo_ray import pipeline, train, tune
from madpo_ray.config import Config, UserError
from madpo_ray.config_file import load_config


@pytest.mark.ray
@pytest.mark.deepspeed
def test_a_search_over_the_finished_margins(finished_run: tuple[Config, Any], tmp_path: Path) -> None:
    config, _ = finished_run
    raw = config.model_dump(mode="json")
    raw["tune"]["num_samples"] = 2
    raw["train"] |= {"max_steps": 4, "eval_steps": 2}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    # In a process of its own: Tune needs a Ray with the dashboard's state API, which the tests' shared one leaves out.
    program = Path(sys.executable).with_name("madpo-ray")
    done = subprocess.run([program, "tune", "--config", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials, 0 failed; best eval_rewards/accuracies" in done.stdout
    trials = json.loads((tune.folder(config) / "trials.json").read_text())
    assert [sorted(trial["values"]) for trial in trials] == [["beta", "c_max", "c_min"]] * 2
    assert trials[0]["values"] != trials[1]["values"]
    best = load_config(tune.folder(config) / "best.yaml")
    winner = max(trials, key=lambda trial: trial[tune.METRIC])
    assert {key: getattr(best.train, key) for key in winner["values"]} == winner["values"]
    # Only section train differs, so training with it takes the margins as they are.
    assert [stage.name for stage in pipeline.pending(best)] == ["train", "evaluate"]
    assert train.inputs(best) != train.inputs(config)


def test_values_are_checked_like_a_config(config: Config) -> None:
    assert tune.with_values(config, {"beta": 0.3}).train.beta == 0.3
    with pytest.raises(UserError, match="c_min"):
        tune.with_values(config, {"c_min": 1.0})
