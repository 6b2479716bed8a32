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
from madpo_ray.engine import newest_checkpoint
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
        self.checkpoints = self.config.run.folder / "ray" / train.inputs(self.config).experiment
        self._program = Path(sys.executable).with_name("madpo-ray")
        self.process: subprocess.Popen[str] | None = None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.checkpoints / "metrics" / "metrics.jsonl")

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
        return ranks_below(self.process.pid)


def ranks_below(pid: int) -> list[int]:
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


@pytest.fixture
def command(raw_config: dict[str, Any], scored_pairs: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Makes a command by the name of its run and settings of its training."""
    made: list[Command] = []

    def make(name: str, **settings: Any) -> Command:
        raw = {**raw_config, "run": {"name": name, "storage_path": str(tmp_path)}}
        del raw["sft"]
        raw["data"] = {**raw["data"], "keep_columns": []}
        raw["evaluate"] = {}
        raw["train"] |= {"max_steps": STEPS, "save_steps": 5, **settings}
        (tmp_path / name).mkdir()
        made.append(Command(raw, scored_pairs, tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()


def starts(metrics: Path) -> list[int]:
    """The first step of each start of a training, by the event files that it left."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = [EventFileLoader(str(file)).Load() for file in sorted((metrics / "tensorboard").iterdir())]
    return [next(event.step for event in events if event.HasField("session_log")) for events in files]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line])


@pytest.fixture
def assert_ends_undisturbed(
    train_on: Callable[..., Any], scored_pairs: Path, tmp_path: Path
) -> Callable[[Command], None]:
    """Compares losses and weights with those of the same training on two ranks that nothing happened to."""

    def check(command: Command) -> None:
        job = train.job(command.config, output=tmp_path / "undisturbed", experiment="undisturbed")
        train_on(dataclasses.replace(job, source=scored_pairs), 2)
        folder = train.folder(command.config)
        assert len(losses(job.metrics)) == command.config.train.max_steps
        assert torch.equal(losses(folder), losses(job.metrics))
        ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, job.output))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    return check


def test_a_killed_worker_and_sigterm(
    command: Callable[..., Command], assert_ends_undisturbed: Callable[[Command], None]
) -> None:
    disturbed = command("disturbed")
    process = disturbed.start()
    disturbed.at_step(7)
    os.kill(disturbed.workers()[0], signal.SIGKILL)
    disturbed.at_step(20)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    saved = re.search(r"SIGTERM came: saved at step (\d+) of 40", output)
    assert saved, output
    assert not train.folder(disturbed.config).exists()
    code, output = disturbed.run()
    assert code == 0, output
    first, second, third = starts(disturbed.checkpoints / "metrics")
    assert first == 1
    assert 5 < second <= 20  # from a checkpoint
    assert third == int(saved[1]) + 1
    assert_ends_undisturbed(disturbed)


@pytest.mark.slow
def test_the_wall_time_ends_a_training_with_a_code_of_its_own(
    command: Callable[..., Command], assert_ends_undisturbed: Callable[[Command], None]
) -> None:
    hurried = command("hurried")
    code, output = hurried.run("--set", "run.max_wall_time=0.001")
    assert code == 75, output
    assert "saved at step 1 of 40; the same command goes on from there" in output
    code, output = hurried.run()
    assert code == 0, output
    assert_ends_undisturbed(hurried)


def assert_each_start_was_from_a_checkpoint(killed: Command) -> None:
    """After kills at steps 7 * draw and on: the newest checkpoint may be torn, and the one before it is whole."""
    began = starts(killed.checkpoints / "metrics")
    assert began == sorted(began)
    assert began[0] == 1
    assert began[-1] > 7 * 4 - 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one worker", "all workers"])
def test_killed_workers_are_started_again(
    who: str, command: Callable[..., Command], assert_ends_undisturbed: Callable[[Command], None]
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
    assert_each_start_was_from_a_checkpoint(killed)
    assert_ends_undisturbed(killed)


@pytest.mark.slow
def test_a_killed_driver_is_started_again_by_hand(
    command: Callable[..., Command], assert_ends_undisturbed: Callable[[Command], None]
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
    assert_each_start_was_from_a_checkpoint(killed)
    assert_ends_undisturbed(killed)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of one CPU a node: two for ranks, two for what feeds them, one to spare."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(4):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_draining_node_is_saved_for_before_it_is_gone(
    command: Callable[..., Command], nodes: Any, assert_ends_undisturbed: Callable[[Command], None]
) -> None:
    leaving = command("leaving", max_steps=150, save_steps=None)
    process = leaving.start("--set", f"cluster.address={nodes.address}")
    leaving.at_step(5)
    raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes.worker_nodes}
    node = next(node for node, pid in raylets.items() if ranks_below(pid))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    which = ["--address", nodes.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "600"]
    subprocess.run([Path(sys.executable).with_name("ray"), "drain-node", *which, *reason], check=True)
    while (saved := newest_checkpoint(leaving.checkpoints)) is None:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    assert saved[0] < 150  # for the notice: there is no other reason to save before the end
    nodes.remove_node(node, allow_graceful=False)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert starts(leaving.checkpoints / "metrics") == [1, saved[0] + 1]
    assert_ends_undisturbed(leaving)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_the_limit(command: Callable[..., Command]) -> None:
    best = command("best", eval_steps=3, metric_for_best_model="eval_loss", save_total_limit=1, learning_rate=3e-2)
    code, output = best.run()
    assert code == 0, output
    lines = [line for line in best.metrics if "eval_loss" in line]
    chosen = min(lines, key=lambda line: line["eval_loss"])
    assert chosen["step"] < lines[-1]["step"]
    assert f"step {chosen['step']}: eval_loss {chosen['eval_loss']:.4f}" in output
    assert len(list(best.checkpoints.glob("checkpoint_*/rank-0.json"))) == 2


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_command_with_one_message(command: Callable[..., Command]) -> None:
    code, output = command("diverging", learning_rate=1e30, save_steps=1).run()
    assert code == 1, output
    assert re.search(r"of step \d+ is (nan|inf|-inf); the optimizer has not moved. Pairs of the step: pair-", output)
    assert "The last good checkpoint is step" in output
    assert "Traceback" not in output
