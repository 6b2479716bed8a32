"""Connecting to Ray, and the files below cluster/."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from madpo_ray.artifacts.tables import read_columns, rows_files
from madpo_ray.cluster import (
    check_actors,
    check_nodes,
    check_workers_fit,
    connected,
    count_trainings,
)
from madpo_ray.config import ActorPool, ClusterConfig
from madpo_ray.errors import UserError
from madpo_ray.passes import write_rows

TERMINATED = """
import os, signal, threading, time
import ray
from madpo_ray.cluster import connected
from madpo_ray.config import ClusterConfig
from madpo_ray.errors import Stopped
try:
    with connected(ClusterConfig()):
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ray.get(ray.remote(lambda: time.sleep(60)).remote())
except Stopped as stopped:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    raise SystemExit(int(stopped.exit_code))
"""
ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "tests" / "schemas" / "kuberay-1.7.0-rayjobs-v1.schema.json"


@pytest.fixture
def rayjob() -> Any:
    return yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())


@pytest.fixture
def validator() -> Any:
    return jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))


def test_rayjob_is_valid(rayjob: Any, validator: Any) -> None:
    assert list(validator.iter_errors(rayjob)) == []


def test_schema_rejects_a_misspelt_key(rayjob: Any, validator: Any) -> None:
    rayjob["spec"]["entrypont"] = rayjob["spec"].pop("entrypoint")
    assert list(validator.iter_errors(rayjob))


def test_rayjob_passes_the_controllers_checks(rayjob: Any) -> None:
    """What the schema does not say."""
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    yaml.safe_load(spec["runtimeEnvYAML"])
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert (ROOT / spec["entrypoint"].split()[1]).is_file()


def test_refuses_more_workers_than_the_machine_has() -> None:
    message = r"cluster\.num_workers: 4000 workers of 1 CPUs can never be placed"
    with pytest.raises(UserError, match=message), connected(ClusterConfig(num_workers=4000)):
        pass


def test_refuses_workers_that_fit_in_sum_and_on_no_node() -> None:
    two_cpus = {"CPU": 2.0, "memory": 1e9}
    two_gpus = {"CPU": 8.0, "GPU": 2.0}
    check_nodes([two_cpus] * 3, ClusterConfig(num_workers=2, cpus_per_worker=2))
    message = "the 2 nodes have places for 0 such workers, each on one node"
    with pytest.raises(UserError, match=message):
        check_nodes([two_cpus] * 2, ClusterConfig(num_workers=1, cpus_per_worker=2.5))
    check_nodes([two_gpus] * 2, ClusterConfig(num_workers=4, use_gpu=True, cpus_per_worker=3.5))
    message = "the 2 nodes have places for 2 such workers"
    with pytest.raises(UserError, match=message):
        check_nodes([two_gpus] * 2, ClusterConfig(num_workers=3, use_gpu=True, cpus_per_worker=4.5))


def test_refuses_actors_that_have_no_place_next_to_the_workers() -> None:
    """margins.mode: stream; on GPUs of their own, or on shares."""
    node = {"CPU": 16.0, "GPU": 2.0}
    whole = ClusterConfig(num_workers=2, use_gpu=True)
    shared = ClusterConfig(num_workers=2, use_gpu=True, gpus_per_worker=0.6)
    check_nodes([node], whole)
    check_nodes([node] * 2, whole, ActorPool(2, 4, 1.0, 1.0))
    check_nodes([node], shared, ActorPool(2, 2, 1.0, 0.4))
    message = r"the cluster has 2 GPUs in all; margins\.mode: stream needs 3 with those of the"
    with pytest.raises(UserError, match=message):
        check_nodes([node], whole, ActorPool(1, 1, 1.0, 1.0))
    with pytest.raises(UserError, match=r"the cluster has 16 CPUs .* stream needs 23\.5"):
        check_nodes([node], shared, ActorPool(2, 2, 10.0, 0.4))


def test_share_of_a_gpu_is_of_one_gpu() -> None:
    """Two GPUs have no place for three shares of 0.6."""
    node = {"CPU": 16.0, "GPU": 2.0}
    check_actors([node], ActorPool(4, 4, 1.0, 0.5))
    with pytest.raises(UserError, match="the 1 nodes have places for 2, each on one node"):
        check_actors([node], ActorPool(3, 3, 1.0, 0.6))
    with pytest.raises(UserError, match=r"scoring\.min_actors: 1 actors of 64 CPUs and 0 GPUs"):
        check_actors([node] * 8, ActorPool(1, 8, 64.0, 0.0))
    shared = ClusterConfig(num_workers=3, use_gpu=True, gpus_per_worker=0.6)
    with pytest.raises(UserError, match="have places for 2 such workers"):
        check_nodes([node], shared)


def test_trials_are_counted_by_gpus() -> None:
    """The scarcest resource decides; a trial's workers may be on several nodes."""
    cluster = ClusterConfig(num_workers=2, use_gpu=True)
    assert count_trainings([{"CPU": 64.0, "GPU": 4.0}], cluster) == 2
    assert count_trainings([{"CPU": 64.0, "GPU": 3.0}], cluster) == 1
    assert count_trainings([{"CPU": 32.0, "GPU": 1.0}] * 4, cluster) == 2
    assert count_trainings([{"CPU": 5.0, "GPU": 8.0}], cluster) == 1
    assert count_trainings([{"CPU": 64.0}], cluster) == 0


def test_actors_leave_a_cpu_to_read_with() -> None:
    """Reading tasks would wait for ever."""
    check_actors([{"CPU": 3.0}], ActorPool(2, 2, 1.0, 0.0))
    with pytest.raises(UserError, match="leave none of the cluster's 2 CPUs to read pairs with"):
        check_actors([{"CPU": 1.0}, {"CPU": 1.0}], ActorPool(2, 2, 1.0, 0.0))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_refuses_more_workers_than_the_cluster_has() -> None:
    check_workers_fit(ClusterConfig(num_workers=6))
    message = r"the cluster has 8 CPUs in all, and feeding the workers needs 1\.5"
    with pytest.raises(UserError, match=message):
        check_workers_fit(ClusterConfig(num_workers=7))
    with pytest.raises(UserError, match="the cluster has 0 GPUs in all"):
        check_workers_fit(ClusterConfig(num_workers=1, use_gpu=True))
    check_workers_fit(ClusterConfig(num_workers=9, autoscaling=True))


@pytest.mark.ray
def test_sigterm_has_its_own_exit_code() -> None:
    """And the signal's handler is restored."""
    done = subprocess.run([sys.executable, "-c", TERMINATED], check=False)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_writes_rows_in_order(tmp_path: Path) -> None:
    import ray.data

    with connected(ClusterConfig()):
        write_rows(ray.data.range(40, override_num_blocks=12), tmp_path / "data")
    assert len(rows_files(tmp_path / "data")) >= 12
    assert read_columns(tmp_path / "data", ["id"])["id"].to_pylist() == list(range(40))
