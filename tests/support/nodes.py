"""Ray clusters of several nodes on this machine."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def nodes_of_one_cpu(count: int) -> Iterator[Any]:
    """A Ray cluster with a head and so many other nodes; its `ray.cluster_utils.Cluster`."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
