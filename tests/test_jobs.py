"""The scripts under jobs/, and a pipeline submitted for real to a cluster of its own."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.special import expit

from madpo_ray import pipeline
from madpo_ray.config import PolicyConfig, load_config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
STAGE_SCRIPTS = {
    "prepare_pairs": "pairs",
    "train_sft": "sft",
    "train_reward": "reward",
    "score_margins": "margins",
    "train_policy": "train",
    "evaluate_policy": "evaluate",
    "tune_policy": "tune",
    "export_margins": "export",
}


def test_every_stage_has_a_script() -> None:
    assert list(STAGE_SCRIPTS.values()) == [stage.name for stage in pipeline.STAGES]
    for script, stage in STAGE_SCRIPTS.items():
        assert f'script_main("{stage}")' in (ROOT / "jobs" / f"{script}.py").read_text()


@pytest.mark.parametrize("script", [*STAGE_SCRIPTS, "run_pipeline"])
def test_scripts_have_the_commands_flags(script: str) -> None:
    command = [sys.executable, ROOT / "jobs" / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--config" in done.stdout
    assert "--set" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize("script", ["run_demo", "replicate_paper", "replicate_ratings"])
def test_other_scripts_explain_themselves(script: str) -> None:
    command = [sys.executable, ROOT / "jobs" / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout


def test_experiment_has_the_temperature_of_its_table() -> None:
    done = run_script("replicate_paper", "--temperatures", "0.5", "--sdist", "/no/such/file")
    assert done.returncode == 2
    assert "--temperatures must hold 1, which the table is of" in done.stderr


def test_ablations_are_the_parts_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below tau c is at least 1, above at most 1: one of both is MADPO's weight, the other 1."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    from paper_methods import WEIGHTING, ablated_weights

    def weight(margin: float, c: float) -> float:
        return float(expit(c * margin) / expit(margin))

    settings = PolicyConfig(**WEIGHTING)
    margins = [-9.0, -6.9, -2.0, -0.1, 0.0, 0.5, 3.0, 6.9, 7.1, 9.0, 30.0]
    both = zip(*ablated_weights(np.array(margins), settings), strict=True)
    for margin, (amplified, dampened) in zip(margins, both, strict=True):
        ratio = (settings.c_max - 1) / (1 - settings.c_min)
        growth = ratio * math.exp(settings.lmbda * (abs(margin) - settings.tau))
        c = settings.c_min + (settings.c_max - settings.c_min) / (1 + growth)
        is_kept = margin <= -settings.tau
        assert amplified == pytest.approx(1.0 if is_kept else weight(margin, max(c, 1.0)))
        assert dampened == pytest.approx(1.0 if is_kept else weight(margin, min(c, 1.0)))


def test_demo_copies_into_an_empty_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run holds is left alone."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    from run_demo import copy_run

    (tmp_path / "one" / "margins").mkdir(parents=True)
    (tmp_path / "one" / "train").mkdir()
    (tmp_path / "two").mkdir()
    copy_run(tmp_path / "one", tmp_path / "two")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["margins"]
    (tmp_path / "one" / "pairs").mkdir()
    copy_run(tmp_path / "one", tmp_path / "two")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["margins"]


def test_demo_compares_runs_that_differ_in_the_loss_only(
    raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So DPO can read a copy of MADPO's margins."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    from run_demo import dpo_config

    shipped = yaml.safe_load((ROOT / "jobs" / "configs" / "demo-2cpu.yaml").read_text())
    raw_config["margins"] = shipped["margins"]
    storage = Path(raw_config["run"]["storage_path"])
    raw_config["evaluate"] |= {"compare_with": [str(storage / "other")]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    madpo = load_config(file)
    dpo = dpo_config(file, [])
    assert (dpo.run.name, dpo.train.loss_type) == ("other", "sigmoid")
    assert margins.STAGE.inputs(dpo) == margins.STAGE.inputs(madpo)
    with pytest.raises(UserError, match="next to this run"):
        dpo_config(file, [f"run.storage_path={tmp_path / 'elsewhere'}"])


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    return str(file)


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "jobs" / f"{script}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pipeline_script_plans(config_file: str) -> None:
    """The example of the Python API."""
    done = run_script("run_pipeline", "--config", config_file, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "stages to do: pairs, sft, reward, margins, train, evaluate" in done.stdout


def test_pipeline_script_refuses_bad_input(config_file: str) -> None:
    done = run_script("run_pipeline", "--config", config_file, "--set", "train.bta=1")
    assert done.returncode == 2
    assert "did you mean 'beta'?" in done.stderr
    assert "Traceback" not in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a one-node cluster with job submission."""
    dashboard = free_port()
    ports = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
    }
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=6", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in ports.items()]
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir=/tmp/ray-test-{os.getpid()}"]
    # The jobs' `python` has to be this one.
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with (tmp_path_factory.mktemp("head") / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )

    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 180  # on a machine that is busy
    ping = [BIN / "ray", "job", "list", "--address", address]
    while subprocess.run(ping, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(1)
    yield address

    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def submit(head: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--address", head, "--working-dir", str(ROOT)]
    command += ["--", "python", f"jobs/{script}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.ray
@pytest.mark.slow
def test_submits_a_stage(head: str, config_file: str, tmp_path: Path) -> None:
    done = submit(head, "prepare_pairs", "--config", config_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"pairs: \d+ s", done.stdout)
    assert (tmp_path / "tiny" / "pairs" / "manifest.json").exists()

    done = submit(head, "train_policy", "--config", config_file, "--set", "train.bta=1")
    assert done.returncode == 1  # ray job submit's own code for a job that ended with 2
    assert "did you mean 'beta'?" in done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
def test_submits_the_pipeline(head: str, config_file: str, tmp_path: Path) -> None:
    done = submit(head, "run_pipeline", "--config", config_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"evaluate: \d+ s", done.stdout)
    assert (tmp_path / "tiny" / "evaluate" / "evaluation.json").exists()
