"""Connect to Ray, or start a local one."""

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from madpo_ray.cluster.placement import check_actors, check_nodes, explain_too_many
from madpo_ray.config import ActorPool, ClusterConfig
from madpo_ray.environment import runtime_env, set_for_local_ray
from madpo_ray.errors import ExitCode, Stopped, UserError
from madpo_ray.passes import ordered_execution
from madpo_ray.signals import on_sigterm

# Ray takes a second to import, and a dry run does not need it: it is imported inside functions.

# Logical CPUs of a local Ray beyond the machine's: data tasks and Tune's drivers mostly wait.
LOCAL_EXTRA_CPUS = 2


@contextlib.contextmanager
def connected(
    cluster: ClusterConfig,
    *,
    actors: ActorPool | None = None,
    streams: bool = False,
    dashboard: bool = False,
) -> Iterator[None]:
    """Connects to the config's cluster, to RAY_ADDRESS, or to a local Ray that ends with the block.

    If this process is connected already, only checks the cluster and sets Ray Data's options.

    Args:
        actors: those that score pairs.
        streams: whether they run at the same time as the workers.

    Raises:
        UserError: the cluster cannot be reached, or can never place the config's workers or actors.
        Stopped: SIGTERM was received inside the block.
    """
    import ray

    if ray.is_initialized():
        with _ready_for_passes(cluster, actors, streams):
            yield
        return

    def start() -> None:
        _start_or_connect(cluster, actors if streams else None, dashboard=dashboard)

    # SystemExit is the only exception that passes through Ray's calls. Ray installs a handler of
    # its own when it starts.
    with on_sigterm(lambda: sys.exit(ExitCode.TERMINATED), prepare=start) as terminated:
        try:
            with _ready_for_passes(cluster, actors, streams):
                yield
        except SystemExit:
            if terminated.is_set():  # Ray passes the exit on with a code of its own
                message = "received SIGTERM: run the same command again to finish"
                raise Stopped(message, ExitCode.TERMINATED) from None
            raise
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _ready_for_passes(
    cluster: ClusterConfig, actors: ActorPool | None, streams: bool
) -> Iterator[None]:
    """Checks the cluster, sets Ray Data's options, and raises Stopped if actors find no place."""
    import ray.exceptions

    check_workers_fit(cluster, actors, streams=streams)
    configure_data(cluster)
    try:
        yield
    except ray.exceptions.GetTimeoutError as error:
        raise Stopped(
            "the actors were not placed, with their models loaded, within "
            f"cluster.placement_timeout_s: {cluster.placement_timeout_s:g} seconds. Raise it if "
            "loading takes longer (`ray status` shows what is free); the same command tries again",
            ExitCode.FAILED,
        ) from error


def _start_or_connect(
    cluster: ClusterConfig, streaming: ActorPool | None, *, dashboard: bool
) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _check_reachable(address, cluster.connect_timeout_s)
            ray.init(address=address, runtime_env=runtime_env(), **options)
        except OSError as error:
            source = "cluster.address" if cluster.address else "RAY_ADDRESS"
            hint = "give the head's host:6379, or auto on a node of the cluster"
            if address.startswith("http"):
                hint = f"that is its dashboard, for `ray job submit`: {hint}"
            raise UserError(
                f"{source}: no Ray cluster answers at {address} ({error}); {hint}, or remove "
                f"{source} for a Ray of its own"
            ) from None
        except RuntimeError as error:
            if "Version mismatch" not in str(error):
                raise
            raise UserError(f"the cluster at {address} has other versions: {error}") from None
        return

    _check_local(cluster)
    set_for_local_ray()
    _protect_token()
    # "local": never a cluster that happens to run on this machine; its address has to be given.
    num_cpus = (os.cpu_count() or 1) + LOCAL_EXTRA_CPUS
    if streaming is not None:  # actors share the machine's CPUs with the workers
        num_cpus += math.ceil(streaming.min_size * streaming.num_cpus)
    with _known_address() if dashboard else contextlib.nullcontext():
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=dashboard, **options)


@contextlib.contextmanager
def _known_address() -> Iterator[None]:
    """Processes of a Ray that is started in the block know its address.

    Ray Tune frees a stopped trial's workers through Ray's state API. That reads the address from
    the environment, and fails if none is set while several Rays run on this machine.
    """
    import ray.util

    host = ray.util.get_node_ip_address()
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    added = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{host}:{port}"}
    before = {name: os.environ[name] for name in added if name in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        os.environ.update(before)


def _protect_token() -> None:
    """Makes ~/.ray private: Ray writes its token there, readable by everyone.

    Whoever reads it can run code as this user.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or not ours: no token goes there
        folder = Path.home() / ".ray"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700)


def _check_reachable(address: str, timeout_s: float) -> None:
    """Raises OSError if nothing listens at `host:port`; Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=timeout_s).close()


def _check_local(cluster: ClusterConfig) -> None:
    available = os.cpu_count() or 1
    if cluster.num_workers * cluster.cpus_per_worker > available:
        raise UserError(explain_too_many(cluster, f"this machine has {available} CPUs"))


def check_workers_fit(
    cluster: ClusterConfig, actors: ActorPool | None = None, *, streams: bool = False
) -> None:
    """Raises UserError if the nodes, as they are, have no place for the workers or actors."""
    if cluster.autoscaling:
        return
    nodes = alive_nodes()
    check_nodes(nodes, cluster, actors if streams else None)
    if actors is not None:
        check_actors(nodes, actors)


def alive_nodes() -> list[Mapping[str, float]]:
    """The resources of each connected node, by Ray's names."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def configure_data(cluster: ClusterConfig) -> None:
    """Rows keep their order; actors that find no place are an error; bars are for terminals."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options = ordered_execution()
    context.wait_for_min_actors_s = math.ceil(cluster.placement_timeout_s)
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
