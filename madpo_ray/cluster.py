"""Connect to Ray, and refuse what the cluster can never place."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from madpo_ray.config import ClusterConfig, ExitCode, Stopped, UserError

# Logical CPUs of a local Ray beyond the machine's: data tasks and Tune's trial drivers wait more than they compute.
LOCAL_EXTRA_CPUS = 2
# What Ray Data needs beside the workers: a read task, and the actor that assembles micro-batches.
DATA_CPUS = 1.5
CONNECT_TIMEOUT_S = 10.0


@contextlib.contextmanager
def connected(cluster: ClusterConfig, *, dashboard: bool = False) -> Iterator[None]:
    """A connection to the config's cluster, RAY_ADDRESS's, or a local Ray that ends with the block.

    Raises:
        UserError: the cluster cannot be reached, or can never place the config's workers.
    """
    import ray

    if ray.is_initialized():
        check_workers_fit(cluster)
        _prepare_data()
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address:
        try:
            _knock(address)
            ray.init(address=address, **options)
        except (ConnectionError, OSError) as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({error}); start one, or leave cluster.address out"
            ) from None
    else:
        _check_local(cluster)
        # Parquet footers are read by a pool of up to 32 one-CPU actors, which would starve a small machine.
        os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
        # Not a cluster that happens to run on this machine: its address has to be given.
        num_cpus = (os.cpu_count() or 1) + LOCAL_EXTRA_CPUS
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=dashboard, **options)
    terminated = _exit_on_sigterm()
    try:
        check_workers_fit(cluster)
        _prepare_data()
        yield
    except SystemExit:
        if terminated.is_set():  # Ray hands the exit on, with a code of its own
            raise Stopped("SIGTERM came: the same command does what is left", ExitCode.TERMINATED) from None
        raise
    finally:
        ray.shutdown()


def _exit_on_sigterm() -> threading.Event:
    """From now on SIGTERM sets the event and raises SystemExit, the one exception that passes through Ray's calls."""
    terminated = threading.Event()

    def leave(*_: Any) -> None:
        terminated.set()
        sys.exit(ExitCode.TERMINATED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
    return terminated


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _check_local(cluster: ClusterConfig) -> None:
    have = os.cpu_count() or 1
    if cluster.num_workers * cluster.cpus_per_worker > have:
        raise UserError(_too_many(cluster, f"this machine has {have} CPUs"))


def check_workers_fit(cluster: ClusterConfig) -> None:
    """Raises UserError where the cluster's nodes together have too few CPUs or GPUs for the workers."""
    import ray

    if cluster.autoscaling:
        return
    have = ray.cluster_resources()
    needs = {"CPU": cluster.num_workers * cluster.cpus_per_worker + DATA_CPUS}
    if cluster.use_gpu:
        needs["GPU"] = cluster.num_workers
    beside = f", and feeding them takes {DATA_CPUS:g} CPUs"
    for resource, amount in needs.items():
        if amount > have.get(resource, 0):
            raise UserError(_too_many(cluster, f"the cluster has {have.get(resource, 0):g} {resource}s in all{beside}"))


def _too_many(cluster: ClusterConfig, have: str) -> str:
    each = f"{cluster.cpus_per_worker:g} CPUs" + (" and a GPU" if cluster.use_gpu else "")
    return (
        f"cluster.num_workers: {cluster.num_workers} workers of {each} can never be placed: {have}. "
        "Lower num_workers or cpus_per_worker, or set cluster.autoscaling: true if nodes will be added"
    )


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Ray resources of one worker, named as Ray names them."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})


def num_threads(cluster: ClusterConfig) -> int:
    """CPU threads of one worker or actor."""
    return max(1, int(cluster.cpus_per_worker))


def actor_pool(cluster: ClusterConfig) -> dict[str, Any]:
    """Arguments of `map_batches` for as many model actors as there are workers."""
    import ray.data

    resources = worker_resources(cluster)
    pool = ray.data.ActorPoolStrategy(size=cluster.num_workers)
    return {"compute": pool, "num_cpus": resources["CPU"], "num_gpus": resources.get("GPU")}


def ordered_execution() -> Any:
    """Ray Data options under which rows keep their order, whatever finishes first."""
    import ray.data

    return ray.data.ExecutionOptions(preserve_order=True)


def _prepare_data() -> None:
    """Rows keep their order; no bars where there is no terminal."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options = ordered_execution()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that bars are off
