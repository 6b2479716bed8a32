"""Ray clusters of several nodes on this machine."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def nodes_of_one_cpu(count: int) -> Iterator[Any]:
    """A Ray cluster of so many nodes, and a head that runs no task, which a test cannot remove.

    Its `ray.cluster_utils.Cluster`.
    """
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
