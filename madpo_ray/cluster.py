"""Connect to Ray, refuse what it can never place, and write rows in their order."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray.config import ClusterConfig
from madpo_ray.errors import ExitCode, Stopped, UserError
from madpo_ray.signals import on_sigterm

if TYPE_CHECKING:
    import ray.data

# Ray takes a second to import, and a dry run does not need it: it is imported inside functions.

# Logical CPUs of a local Ray beyond the machine's: data tasks and Tune's drivers mostly wait.
LOCAL_EXTRA_CPUS = 2
# What Ray Data needs next to the workers: a read task, and the actor that builds micro-batches.
DATA_CPUS = 1.5
CONNECT_TIMEOUT_S = 10.0


@contextlib.contextmanager
def connected(cluster: ClusterConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Connects to the config's cluster, to RAY_ADDRESS, or to a local Ray that ends with the block.

    If this process is connected already, only checks the cluster and sets Ray Data's options.

    Raises:
        UserError: the cluster cannot be reached, or can never place the config's workers.
        Stopped: SIGTERM was received inside the block.
    """
    import ray

    if ray.is_initialized():
        check_workers_fit(cluster)
        _configure_data()
        yield
        return

    def start() -> None:
        _start_or_connect(cluster, dashboard=dashboard)

    # SystemExit is the only exception that passes through Ray's calls. Ray installs a handler of
    # its own when it starts.
    with on_sigterm(lambda: sys.exit(ExitCode.TERMINATED), prepare=start) as terminated:
        try:
            check_workers_fit(cluster)
            _configure_data()
            yield
        except SystemExit:
            if terminated.is_set():  # Ray passes the exit on with a code of its own
                message = "received SIGTERM: run the same command again to finish"
                raise Stopped(message, ExitCode.TERMINATED) from None
            raise
        finally:
            ray.shutdown()


def _start_or_connect(cluster: ClusterConfig, *, dashboard: bool) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _check_reachable(address)
            ray.init(address=address, **options)
        except OSError as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({error}); start one, or remove "
                "cluster.address"
            ) from None
        return

    _check_local(cluster)
    # Workers without a GPU of their own see none: PyTorch and DeepSpeed would take the first.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # Parquet footers are read by up to 32 one-CPU actors, which would starve a small machine.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    # "local": never a cluster that happens to run on this machine; its address has to be given.
    num_cpus = (os.cpu_count() or 1) + LOCAL_EXTRA_CPUS
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=dashboard, **options)


def _check_reachable(address: str) -> None:
    """Raises OSError if nothing listens at `host:port`; Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _check_local(cluster: ClusterConfig) -> None:
    available = os.cpu_count() or 1
    if cluster.num_workers * cluster.cpus_per_worker > available:
        raise UserError(_explain_too_many(cluster, f"this machine has {available} CPUs"))


def check_workers_fit(cluster: ClusterConfig) -> None:
    """Raises UserError if all nodes together have too few CPUs or GPUs for the workers."""
    import ray

    if cluster.autoscaling:
        return
    available = ray.cluster_resources()
    needed = {"CPU": cluster.num_workers * cluster.cpus_per_worker + DATA_CPUS}
    if cluster.use_gpu:
        needed["GPU"] = cluster.num_workers
    for resource, amount in needed.items():
        count = available.get(resource, 0)
        if amount > count:
            reason = (
                f"the cluster has {count:g} {resource}s in all, and feeding the workers needs "
                f"{DATA_CPUS:g} CPUs"
            )
            raise UserError(_explain_too_many(cluster, reason))


def _explain_too_many(cluster: ClusterConfig, available: str) -> str:
    worker = f"{cluster.cpus_per_worker:g} CPUs" + (" and a GPU" if cluster.use_gpu else "")
    return (
        f"cluster.num_workers: {cluster.num_workers} workers of {worker} can never be placed: "
        f"{available}. Lower num_workers or cpus_per_worker, or set cluster.autoscaling: true if "
        "nodes will be added"
    )


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Resources of one worker, by Ray's names."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.use_gpu:
        resources["GPU"] = 1.0
    return resources


def actor_pool(cluster: ClusterConfig) -> dict[str, Any]:
    """Arguments of `map_batches` for as many model actors as there are workers."""
    import ray.data

    resources = worker_resources(cluster)
    return {
        "compute": ray.data.ActorPoolStrategy(size=cluster.num_workers),
        "num_cpus": resources["CPU"],
        "num_gpus": resources.get("GPU"),
    }


def ordered_execution() -> "ray.data.ExecutionOptions":
    """Ray Data options under which rows keep their order, whatever finishes first."""
    import ray.data

    return ray.data.ExecutionOptions(preserve_order=True)


def _configure_data() -> None:
    """Rows keep their order; progress bars appear on a terminal only."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options = ordered_execution()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def write_rows(dataset: "ray.data.Dataset", rows: Path) -> None:
    """Writes a Ray dataset to a fresh folder, in its order."""
    from ray.data import SaveMode
    from ray.data.datasource import FilenameProvider

    class OrderedNames(FilenameProvider):  # type: ignore[misc]
        """File names that follow the order of the rows, without a random part."""

        def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
            return f"part-{task_index:06}.parquet"

    # Ray's append mode demands a random part in each name; there is nothing to overwrite.
    names = OrderedNames(file_format="parquet")
    dataset.write_parquet(str(rows), filename_provider=names, mode=SaveMode.OVERWRITE)
