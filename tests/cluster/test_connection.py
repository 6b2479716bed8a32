"""Connecting to Ray."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from madpo_ray.artifacts.tables import read_columns, rows_files
from madpo_ray.cluster.connection import check_workers_fit, connected
from madpo_ray.config import ClusterConfig
from madpo_ray.errors import UserError
from madpo_ray.passes import write_rows

TERMINATED = """
import os, signal, threading, time
import ray
from madpo_ray.cluster.connection import connected
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


def test_refuses_more_workers_than_the_machine_has() -> None:
    message = r"cluster\.num_workers: 4000 workers of 1 CPUs can never be placed"
    with pytest.raises(UserError, match=message), connected(ClusterConfig(num_workers=4000)):
        pass


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
