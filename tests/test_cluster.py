"""Files under cluster/, and what connecting to a cluster refuses."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from madpo_ray.cluster import check_workers_fit, connected
from madpo_ray.config import ClusterConfig, UserError

TERMINATED = """
import os, signal, threading, time
import ray
from madpo_ray.cluster import connected
from madpo_ray.config import ClusterConfig, Stopped
try:
    with connected(ClusterConfig()):
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ray.get(ray.remote(lambda: time.sleep(60)).remote())
except Stopped as stopped:
    raise SystemExit(int(stopped.exit_code))
"""
ROOT = Path(__file__).parent.parent


@pytest.fixture
def rayjob() -> Any:
    return yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())


@pytest.fixture
def validator() -> Any:
    schema = json.loads((ROOT / "tests" / "schemas" / "kuberay-1.7.0-rayjobs-v1.schema.json").read_text())
    return jsonschema.Draft7Validator(schema)


def test_rayjob_is_valid(rayjob: Any, validator: Any) -> None:
    assert list(validator.iter_errors(rayjob)) == []


def test_the_schema_sees_a_misspelt_key(rayjob: Any, validator: Any) -> None:
    rayjob["spec"]["entrypont"] = rayjob["spec"].pop("entrypoint")
    assert list(validator.iter_errors(rayjob))


def test_what_only_the_controller_checks(rayjob: Any) -> None:
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    yaml.safe_load(spec["runtimeEnvYAML"])
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert (ROOT / spec["entrypoint"].split()[1]).is_file()


def test_more_workers_than_this_machine_has() -> None:
    with (
        pytest.raises(UserError, match=r"cluster\.num_workers: 4000 workers of 1 CPUs can never be placed"),
        connected(ClusterConfig(num_workers=4000)),
    ):
        pass


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_more_workers_than_a_running_cluster_has() -> None:
    check_workers_fit(ClusterConfig(num_workers=6))
    with pytest.raises(UserError, match=r"the cluster has 8 CPUs in all, and feeding them takes 1\.5"):
        check_workers_fit(ClusterConfig(num_workers=7))
    with pytest.raises(UserError, match="the cluster has 0 GPUs in all"):
        check_workers_fit(ClusterConfig(num_workers=1, use_gpu=True))
    check_workers_fit(ClusterConfig(num_workers=9, autoscaling=True))


@pytest.mark.ray
def test_sigterm_leaves_with_its_own_code() -> None:
    assert subprocess.run([sys.executable, "-c", TERMINATED], check=False).returncode == 128 + signal.SIGTERM
