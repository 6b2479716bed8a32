"""A training on Ray, killed and stopped from outside, and started again by the same command."""

import dataclasses
import os
import random
import re
import shutil
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

from madpo_ray.artifacts.building import building
from madpo_ray.artifacts.tables import rows_folder
from madpo_ray.config import parse_config
from madpo_ray.stages import margins, train
from madpo_ray.stages.stage import Build
from madpo_ray.training.checkpoints import newest_checkpoint
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.metrics import read_metrics
from support.nodes import nodes_of_one_cpu
from support.ranks import TrainOn, logged, metrics_of

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

STEPS = 40
BIN = Path(sys.executable).parent


class Command:
    """`madpo-ray train` in a process of its own, with a Ray of its own, on margins that exist."""

    def __init__(self, raw: dict[str, Any], scored_pairs: Path, folder: Path) -> None:
        self._file = folder / "config.yaml"
        self._file.write_text(yaml.safe_dump(raw))
        self.config = parse_config(raw)
        stage = margins.STAGE
        with building(stage.folder(self.config), stage.inputs(self.config)) as (partial, results):
            shutil.copytree(scored_pairs, rows_folder(partial))
            results["rejects"] = {}
        self.folder = train.STAGE.folder(self.config)
        fingerprint = train.STAGE.inputs(self.config).fingerprint
        self.job = train.policy_job(Build(self.config, self.folder, fingerprint))
        self.process: subprocess.Popen[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.job.checkpoints

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [BIN / "madpo-ray", "train", "--config", self._file, *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return self.process

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate()
        return process.returncode, output

    def wait_for_step(self, step: int) -> None:
        """Waits until the metrics show a step."""
        assert self.process is not None
        while not any(line["step"] >= step for line in metrics_of(self.job)):
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.005)

    def workers(self) -> list[int]:
        """The pids of the ranks."""
        assert self.process is not None
        return ranks_below(self.process.pid)


def ranks_below(pid: int) -> list[int]:
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


MakeCommand = Callable[..., Command]
Check = Callable[[Command], None]


@pytest.fixture
def command(
    raw_config: dict[str, Any], scored_pairs: Path, tmp_path: Path
) -> Iterator[MakeCommand]:
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


def first_steps(job: TrainingJob) -> list[int]:
    """The first step of each start of a training, by the event files that it left."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((job.metrics / "tensorboard").iterdir())
    starts = []
    for file in files:
        events = EventFileLoader(str(file)).Load()
        starts.append(next(event.step for event in events if event.HasField("session_log")))
    return starts


@pytest.fixture
def assert_ends_undisturbed(train_on: TrainOn, tmp_path: Path) -> Check:
    """Compares losses and weights with those of the same training that nothing happened to."""

    def check(command: Command) -> None:
        folder = tmp_path / "undisturbed"
        job = dataclasses.replace(command.job, output=folder, storage=folder / "ray")
        train_on(job, 2)
        lines = read_metrics(command.folder / "metrics.jsonl")
        losses = torch.tensor([line["loss"] for line in lines if "loss" in line])
        assert len(losses) == command.config.train.max_steps
        assert torch.equal(losses, logged(job))
        ours = load_file(command.folder / "model" / "model.safetensors")
        theirs = load_file(folder / "model" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    return check


@pytest.mark.slow
def test_killed_worker_and_sigterm(command: MakeCommand, assert_ends_undisturbed: Check) -> None:
    """Both resume from a checkpoint, to bitwise the same weights."""
    disturbed = command("disturbed")
    process = disturbed.start()
    disturbed.wait_for_step(7)
    os.kill(disturbed.workers()[0], signal.SIGKILL)
    disturbed.wait_for_step(20)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    saved = re.search(r"received SIGTERM: saved at step (\d+) of 40", output)
    assert saved, output
    assert not disturbed.folder.exists()

    code, output = disturbed.run()
    assert code == 0, output
    first, second, third = first_steps(disturbed.job)
    assert first == 1
    assert 5 < second <= 20
    assert third == int(saved[1]) + 1
    assert_ends_undisturbed(disturbed)


@pytest.mark.slow
def test_wall_time_has_its_own_exit_code(
    command: MakeCommand, assert_ends_undisturbed: Check
) -> None:
    hurried = command("hurried")
    code, output = hurried.run("--set", "run.max_wall_time=0.001")
    assert code == 75, output
    assert "saved at step 1 of 40; the same command resumes there" in output
    code, output = hurried.run()
    assert code == 0, output
    assert_ends_undisturbed(hurried)


def assert_resumed_from_checkpoints(killed: Command) -> None:
    """After kills from steps 7 * draw on: the newest checkpoint may be torn, not the one before."""
    began = first_steps(killed.job)
    assert began == sorted(began)
    assert began[0] == 1
    assert began[-1] > 7 * 4 - 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one worker", "all workers"])
def test_killed_workers_are_restarted(
    who: str, command: MakeCommand, assert_ends_undisturbed: Check
) -> None:
    killed = command("killed")
    process = killed.start("--set", "cluster.max_failures=5")
    rng = random.Random(len(who))
    for draw in range(5):
        killed.wait_for_step(rng.randint(7 * draw, 7 * draw + 6))
        time.sleep(rng.uniform(0, 0.1))
        victims = killed.workers()
        assert victims
        for pid in victims[:1] if who == "one worker" else victims:
            os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_resumed_from_checkpoints(killed)
    assert_ends_undisturbed(killed)


@pytest.mark.slow
def test_killed_driver_resumes(command: MakeCommand, assert_ends_undisturbed: Check) -> None:
    """Started again by hand."""
    killed = command("killed")
    rng = random.Random(0)
    for draw in range(5):
        process = killed.start()
        killed.wait_for_step(rng.randint(7 * draw, 7 * draw + 6))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
    code, output = killed.run()
    assert code == 0, output
    assert_resumed_from_checkpoints(killed)
    assert_ends_undisturbed(killed)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two for ranks, two for what feeds them, one to spare."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    with nodes_of_one_cpu(5) as cluster:
        yield cluster


@pytest.mark.slow
def test_draining_node_is_saved_for(
    command: MakeCommand, nodes: Any, assert_ends_undisturbed: Check
) -> None:
    """Before it is gone; there is no other reason to save before the end."""
    leaving = command("leaving", max_steps=150, save_steps=None)
    process = leaving.start("--set", f"cluster.address={nodes.address}")
    leaving.wait_for_step(5)

    raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes.worker_nodes}
    node = next(node for node, pid in raylets.items() if ranks_below(pid))
    drain = [BIN / "ray", "drain-node", "--address", nodes.address, "--node-id", node.node_id]
    drain += ["--deadline-remaining-seconds", "600"]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run(drain, check=True)

    while (saved := newest_checkpoint(leaving.checkpoints)) is None:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    assert saved[0] < 150
    nodes.remove_node(node, allow_graceful=False)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert first_steps(leaving.job) == [1, saved[0] + 1]
    assert_ends_undisturbed(leaving)


@pytest.mark.slow
def test_best_checkpoint_outlives_the_limit(command: MakeCommand) -> None:
    settings = {"eval_steps": 3, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
    best = command("best", **settings, learning_rate=3e-2)
    code, output = best.run("--set", "run.keep_checkpoints=true")
    assert code == 0, output
    lines = [line for line in metrics_of(best.job) if "eval_loss" in line]
    chosen = min(lines, key=lambda line: line["eval_loss"])
    assert chosen["step"] < lines[-1]["step"]
    assert f"step {chosen['step']}: eval_loss {chosen['eval_loss']:.4f}" in output
    assert len(list(best.checkpoints.glob("checkpoint_*/rank-0.json"))) == 2


@pytest.mark.slow
def test_nonfinite_loss_ends_the_command(command: MakeCommand) -> None:
    """With one message, and without restarts."""
    code, output = command("diverging", learning_rate=1e30, save_steps=1).run()
    assert code == 1, output
    message = r"of step \d+ is (nan|inf|-inf); the optimizer has not moved. Pairs of the step: pair"
    assert re.search(message, output)
    assert "The last good checkpoint is that of step" in output
    assert "Traceback" not in output
