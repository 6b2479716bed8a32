"""A training on Ray, killed and told to leave from outside, and started again by the same command."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from madpo_ray import margins, train
from madpo_ray.artifacts import building
from madpo_ray.config_file import parse_config
from madpo_ray.metrics import read_metrics
from madpo_ray.tables import parquet_folder

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

STEPS = 40


class Command:
    """`madpo-ray train` in a process of its own, with a Ray of its own, on margins that are there already."""

    def __init__(self, raw: dict[str, Any], scored_pairs: Path, folder: Path) -> None:
        self._file = folder / "config.yaml"
        self._file.write_text(yaml.safe_dump(raw))
        self.config = parse_config(raw)
        with building(margins.folder(self.config), margins.inputs(self.config)) as (partial, _):
            parquet_folder(partial).symlink_to(scored_pairs)
        self._program = Path(sys.executable).with_name("madpo-ray")
        self.process: subprocess.Popen[str] | None = None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        found = list((self.config.run.folder / "ray").glob("train-*/metrics/metrics.jsonl"))
        return read_metrics(found[0]) if found else []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [self._program, "train", "--config", self._file, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return self.process

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate()
        return process.returncode, output

    def at_step(self, step: int) -> None:
        """Waits until the metrics show a step."""
        assert self.process is not None
        while not any(line["step"] >= step for line in self.metrics):
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.005)

    def workers(self) -> list[int]:
        """The pids of the ranks."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


@pytest.fixture
def command(raw_config: dict[str, Any], scored_pairs: Path, tmp_path: Path) -> Iterator[Callable[[str], Command]]:
    made: list[Command] = []

    def make(name: str) -> Command:
        raw = {**raw_config, "run": {"name": name, "storage_path": str(tmp_path)}}
        del raw["sft"]
        raw["data"] = {**raw["data"], "keep_columns": []}
        raw["evaluate"] = {}
        raw["train"] = {**raw["train"], "max_steps": STEPS, "num_train_epochs": 9, "save_steps": 5}
        (tmp_path / name).mkdir()
        made.append(Command(raw, scored_pairs, tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()


@pytest.fixture
def undisturbed(
    command: Callable[[str], Command], scored_pairs: Path, tmp_path: Path, train_on: Callable[..., Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and weights of the same training on two ranks, without Ray, that nothing happens to."""
    config = command("undisturbed").config
    job = train.job(config, output=tmp_path / "undisturbed" / "train", experiment="undisturbed")
    train_on(dataclasses.replace(job, source=scored_pairs), 2)
    return losses(job.metrics), load_file(job.output / "model" / "model.safetensors")


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line])


def assert_finished_like(command: Command, undisturbed: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    folder = train.folder(command.config)
    assert len(losses(folder)) == STEPS
    assert torch.equal(losses(folder), undisturbed[0])
    weights = load_file(folder / "model" / "model.safetensors")
    assert weights.keys() == undisturbed[1].keys()
    assert all(torch.equal(weight, undisturbed[1][name]) for name, weight in weights.items())


def test_a_killed_worker_and_sigterm(
    command: Callable[[str], Command], undisturbed: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    disturbed = command("disturbed")
    process = disturbed.start()
    disturbed.at_step(7)
    os.kill(disturbed.workers()[0], signal.SIGKILL)
    disturbed.at_step(20)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert "SIGTERM came: saved at step" in output
    assert not train.folder(disturbed.config).exists()
    code, output = disturbed.run()
    assert code == 0, output
    assert_finished_like(disturbed, undisturbed)


@pytest.mark.slow
def test_the_wall_time_ends_a_training_with_a_code_of_its_own(
    command: Callable[[str], Command], undisturbed: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    hurried = command("hurried")
    code, output = hurried.run("--set", "run.max_wall_time=0.001")
    assert code == 75, output
    assert "saved at step 1 of 40; the same command goes on from there" in output
    code, output = hurried.run()
    assert code == 0, output
    assert_finished_like(hurried, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one worker", "all workers"])
def test_killed_workers_are_started_again(
    who: str, command: Callable[[str], Command], undisturbed: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    killed = command("killed")
    process = killed.start("--set", "cluster.max_failures=5")
    rng = random.Random(len(who))
    for draw in range(5):
        killed.at_step(rng.randint(7 * draw, 7 * draw + 6))
        time.sleep(rng.uniform(0, 0.1))
        victims = killed.workers()
        assert victims
        for pid in victims[:1] if who == "one worker" else victims:
            os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_finished_like(killed, undisturbed)


@pytest.mark.slow
def test_a_killed_driver_is_started_again_by_hand(
    command: Callable[[str], Command], undisturbed: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    killed = command("killed")
    rng = random.Random(0)
    for draw in range(5):
        process = killed.start()
        killed.at_step(rng.randint(7 * draw, 7 * draw + 6))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
    code, output = killed.run()
    assert code == 0, output
    assert_finished_like(killed, undisturbed)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_the_limit(command: Callable[[str], Command]) -> None:
    best = command("best")
    settings = {"eval_steps": 3, "metric_for_best_model": "eval_loss", "save_total_limit": 1, "learning_rate": 3e-2}
    code, output = best.run(*(f"--set=train.{key}={value}" for key, value in settings.items()))
    assert code == 0, output
    lines = [line for line in best.metrics if "eval_loss" in line]
    chosen = min(lines, key=lambda line: line["eval_loss"])
    assert chosen["step"] < lines[-1]["step"]
    assert f"step {chosen['step']}: eval_loss {chosen['eval_loss']:.4f}" in output
    assert len(list((best.config.run.folder / "ray").glob("train-*/checkpoint_*"))) == 2


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_command_with_one_message(command: Callable[[str], Command]) -> None:
    code, output = command("diverging").run("--set", "train.learning_rate=1e30", "--set", "train.save_steps=1")
    assert code == 1, output
    assert re.search(r"of step \d+ is (nan|inf|-inf); the optimizer has not moved. Pairs of the step: pair-", output)
    assert "The last good checkpoint is step" in output
    assert "Traceback" not in output
