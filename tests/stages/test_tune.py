"""The search: real trials on stored margins, and a config to train with at the end."""

import contextlib
import csv
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from madpo_ray import pipeline
from madpo_ray.config import Config, load_config, parse_config, save_config
from madpo_ray.errors import UserError
from madpo_ray.stages import train, tune
from madpo_ray.training.metrics import METRICS_FILE, read_metrics

PROGRAM = Path(sys.executable).with_name("madpo-ray")
METRIC = "eval_rewards/accuracies"
Run = tuple[Config, list[str]]


def write_config(run: Run, file: Path, **settings: Any) -> Config:
    """The config of a search over a finished run's margins, in a copy of the run."""
    raw = run[0].model_dump(mode="json")
    folder = file.parent / raw["run"]["name"]
    shutil.copytree(run[0].run.folder, folder, ignore=shutil.ignore_patterns("ray"))
    raw["run"]["storage_path"] = str(file.parent)
    raw["tune"] |= {"evaluations": 2, **settings}
    # Far apart and at a high rate, so that trials differ.
    raw["train"] |= {"max_steps": 4, "learning_rate": 1e-2}
    raw["run"]["seed"] = 0
    file.write_text(yaml.safe_dump(raw))
    return load_config(file)


def search(file: Path, *options: str) -> str:
    """In a process of its own.

    Tune needs a Ray with the dashboard's state API, which the tests' shared one omits.
    """
    command = [PROGRAM, "tune", "--config", file, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def search_on_a_terminal(file: Path) -> tuple[str, str]:
    """What it prints, and what its terminal shows meanwhile."""
    controller, terminal = pty.openpty()
    command = [PROGRAM, "tune", "--config", file]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    shown = b""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment
    ) as process:
        os.close(terminal)
        try:
            with contextlib.suppress(OSError):  # the other end is closed
                while part := os.read(controller, 4096):
                    shown += part
            printed, _ = process.communicate()
        finally:
            process.kill()
            os.close(controller)
    assert process.returncode == 0, printed + shown.decode()
    return printed, shown.decode()


def trained_steps(config: Config) -> dict[str, list[int]]:
    """The steps that each trial has logged, by its folder."""
    logs = config.run.ray_folder.glob(f"tune-*-*/metrics/{METRICS_FILE}")
    return {log.parent.parent.name: [line["step"] for line in read_metrics(log)] for log in logs}


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
def test_search_over_finished_margins(finished_run: Run, tmp_path: Path) -> None:
    space = {
        "train.c_max": {"type": "uniform", "min": 1.5, "max": 6.0},
        "train.c_min": {"type": "reciprocal", "of": "train.c_max"},
        "train.loss_type": {"type": "choice", "values": ["madpo", "sigmoid"]},
        "train.global_batch_size": {"type": "int", "min": 4, "max": 8},
    }
    file = tmp_path / "config.yaml"
    config = write_config(finished_run, file, num_samples=3, search_space=space)
    printed = search(file)
    assert "3 trials" in printed
    assert f"best {METRIC}" in printed

    # The first trial has the config's own values, and c_min follows from c_max.
    folder = tune.STAGE.folder(config)
    found = json.loads((folder / "trials.json").read_text())
    trials = found["trials"]
    own = {key: trials[0][key] for key in space if key != "train.c_min"}
    assert own == {
        "train.c_max": 4.0,
        "train.loss_type": "madpo",
        "train.global_batch_size": 8,
    }
    assert all(trial["train.c_min"] == 1 / trial["train.c_max"] for trial in trials)
    with (folder / "trials.csv").open() as stream:
        assert [line["trial"] for line in csv.DictReader(stream)] == ["1", "2", "3"]
    pictures = {picture.stem for picture in (folder / "pictures").iterdir()}
    assert pictures == {"history", "parallel", *space}

    # The best one's config trains on the margins as they are.
    best = load_config(folder / "best.yaml")
    complete = [trial for trial in trials if trial["state"] == "complete"]
    winner = max(complete, key=lambda trial: trial[METRIC])
    assert {f"train.{key}": getattr(best.train, key) for key in ("c_max", "loss_type")} == {
        key: winner[key] for key in ("train.c_max", "train.loss_type")
    }
    assert [stage.name for stage in pipeline.pending(best)] == ["train", "evaluate"]
    assert train.STAGE.inputs(best) != train.STAGE.inputs(finished_run[0])
    assert not list(config.run.ray_folder.glob("tune-*-*/checkpoint_*"))


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
def test_search_resumes_after_a_kill(finished_run: Run, tmp_path: Path) -> None:
    """Trials that have ended do not train again, and the result is that of an undisturbed one."""
    # The second is worse from its first evaluation on, and is stopped there.
    space = {"train.learning_rate": {"type": "grid", "values": [1e-2, 1e-9, 2e-2]}}
    file = tmp_path / "config.yaml"
    config = write_config(
        finished_run,
        file,
        num_samples=1,
        searcher="random",
        max_concurrent_trials=1,
        search_space=space,
    )
    search(file)
    expected = json.loads((tune.STAGE.folder(config) / "trials.json").read_text())
    tune_folder = tune.STAGE.folder(config)

    # The same search, killed once its second trial has begun.
    tune_folder.rename(tmp_path / "undisturbed")
    for folder in config.run.ray_folder.glob("tune-*"):
        folder.rename(tmp_path / folder.name)
    process = subprocess.Popen(
        [PROGRAM, "tune", "--config", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(trained_steps(config)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the workers of a killed driver end a moment later
    ended = list(config.run.ray_folder.glob("tune-*-*/ended.json"))
    seconds = [json.loads(file.read_text())["seconds"] for file in ended]
    before = {
        file.parent.name: (file.parent / "metrics" / METRICS_FILE).stat().st_mtime_ns
        for file in ended
    }
    assert len(before) == 1

    printed = search(file)
    assert "the search resumes" in printed
    found = json.loads((tune_folder / "trials.json").read_text())
    assert [trial["state"] for trial in expected["trials"]] == ["complete", "stopped", "complete"]
    names = (METRIC, "eval_loss", "step", "train.learning_rate", "state")
    assert [found["trials"][0]["seconds"]] == seconds  # of the training, not of its replay
    assert [[trial[name] for name in names] for trial in found["trials"]] == [
        [trial[name] for name in names] for trial in expected["trials"]
    ]
    for name, changed in before.items():
        log = config.run.ray_folder / name / "metrics" / METRICS_FILE
        assert log.stat().st_mtime_ns == changed


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
def test_search_for_rewards_of_samples(finished_run: Run, tmp_path: Path) -> None:
    """Two objectives: the judge's mean reward, and the divergence."""
    file = tmp_path / "config.yaml"
    config = write_config(
        finished_run,
        file,
        num_samples=2,
        objective="reward_and_kl",
        scheduler="none",
        search_space={"train.beta": {"type": "loguniform", "min": 0.01, "max": 1.0}},
    )
    printed, shown = search_on_a_terminal(file)
    assert "2 trials, 0 stopped early, 0 failed" in printed
    assert "2 of 2 trials" in shown  # the table's title
    assert "evaluations" in shown  # a heading
    assert "running" in shown
    found = json.loads((tune.STAGE.folder(config) / "trials.json").read_text())
    assert found["objectives"] == ["reward", "kl"]
    assert all(trial["kl"] > 0 for trial in found["trials"])
    assert any(trial["on_frontier"] for trial in found["trials"])


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
def test_failed_trial_is_recorded(finished_run: Run, tmp_path: Path) -> None:
    """A learning rate at which the loss is not finite; the search continues."""
    file = tmp_path / "config.yaml"
    space = {"train.learning_rate": {"type": "grid", "values": [1e30, 1e-3]}}
    config = write_config(finished_run, file, num_samples=1, searcher="random", search_space=space)
    printed = search(file, "--retrain")
    assert "2 trials, 0 stopped early, 1 failed" in printed
    found = json.loads((tune.STAGE.folder(config) / "trials.json").read_text())
    failed, good = found["trials"]
    assert failed["error"].startswith("StoppedForGood: the ")
    assert "skip_nonfinite" in failed["error"]
    assert good["state"] == "complete"
    best = load_config(tune.STAGE.folder(config) / "best.yaml")
    assert best.train.learning_rate == 1e-3
    assert not pipeline.pending(best)  # it was trained and evaluated, as asked
    assert train.STAGE.is_finished(best)


def test_best_settings_join_the_config_that_is_given(raw_config: dict[str, Any]) -> None:
    """A run that was copied or moved since is not the one that best.yaml names."""
    searched = parse_config(raw_config)
    raw_config["run"]["name"] = "copy"
    raw_config["train"]["logging_steps"] = 3
    given = parse_config(raw_config)
    best = searched.train.model_copy(update={"beta": 0.37, "logging_steps": 5})
    folder = tune.STAGE.folder(given)
    folder.mkdir(parents=True)
    save_config(searched.model_copy(update={"train": best}), folder / tune.BEST)
    found = tune.with_best(given)
    assert (found.train.beta, found.train.logging_steps) == (0.37, 3)
    assert found.run == given.run


def test_ranges_within_bounds(raw_config: dict[str, Any]) -> None:
    space = {"train.c_min": {"type": "uniform", "min": 0.1, "max": 1.0}}
    raw_config["tune"] = {"search_space": space}
    with pytest.raises(
        UserError, match=r"tune\.search_space\.train\.c_min: must be strictly between"
    ):
        tune.STAGE.check(parse_config(raw_config))


def test_values_of_the_right_kind(raw_config: dict[str, Any]) -> None:
    space = {"train.loss_type": {"type": "choice", "values": ["madpo", "dpo"]}}
    raw_config["tune"] = {"search_space": space}
    with pytest.raises(UserError, match=r"tune\.search_space\.train\.loss_type"):
        tune.STAGE.check(parse_config(raw_config))


def test_values_agree_with_the_other_sections(raw_config: dict[str, Any]) -> None:
    """A combination has to be a config: its trial would fail on the workers."""
    raw_config["model"]["torch_compile"] = True
    space: dict[str, Any] = {"train.zero_stage": {"type": "choice", "values": [2, 3]}}
    raw_config["tune"] = {"search_space": space}
    with pytest.raises(UserError, match=r"at train\.zero_stage: 3: .*torch_compile does not work"):
        tune.STAGE.check(parse_config(raw_config))
    space["train.zero_stage"]["values"] = [0, 2]
    tune.STAGE.check(parse_config(raw_config))
    space["train.weight_column"] = {"type": "choice", "values": [None, "quality"]}
    with pytest.raises(UserError, match=r"data\.keep_columns"):
        tune.STAGE.check(parse_config(raw_config))


def test_losses_with_margins_need_them(raw_config: dict[str, Any]) -> None:
    space = {"train.loss_type": {"type": "choice", "values": ["madpo", "sigmoid"]}}
    raw_config["tune"] = {"search_space": space}
    raw_config["train"]["loss_type"] = "sigmoid"
    with pytest.raises(UserError, match=r"set margins\.with_rewards: true"):
        tune.STAGE.check(parse_config(raw_config))
    raw_config["margins"] = {"with_rewards": True}
    tune.STAGE.check(parse_config(raw_config))


def test_rewards_need_a_judge(raw_config: dict[str, Any]) -> None:
    raw_config["evaluate"]["judge"] = None
    raw_config["tune"] = {"objective": "reward", "scheduler": "none"}
    with pytest.raises(UserError, match=r"objective: reward needs evaluate\.judge"):
        tune.STAGE.check(parse_config(raw_config))


def test_concurrent_trials_fit(raw_config: dict[str, Any]) -> None:
    raw_config["tune"] = {"max_concurrent_trials": 500}
    with pytest.raises(UserError, match="500 trials of 2 workers do not fit"):
        tune.STAGE.check(parse_config(raw_config))
