"""Whether nodes have room for workers and actors: what can never be placed is refused.

Ray itself would wait for ever. Arithmetic only: knows no Ray.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from madpo_ray.config import ActorPool, ClusterConfig
from madpo_ray.errors import UserError

# What Ray Data needs next to the workers: a read task, and the actor that builds micro-batches.
DATA_CPUS = 1.5
READ_CPUS = 1  # of one task that reads
NO_GPUS = (
    "Set cluster.use_gpu: false, or see what hides them: nvidia-smi, CUDA_VISIBLE_DEVICES, "
    "`ray status`"
)
IF_NODES_COME = ", or set cluster.autoscaling: true if nodes will be added"


def count_trainings(nodes: Sequence[Mapping[str, float]], cluster: ClusterConfig) -> int:
    """How many trainings, each with all its workers, such nodes have room for at a time."""
    places = sum(_places_on(node, cluster.worker_resources) for node in nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    cpus_each = cluster.num_workers * cluster.cpus_per_worker + DATA_CPUS
    return min(places // cluster.num_workers, math.floor(cpus / cpus_each))


def check_nodes(
    nodes: Sequence[Mapping[str, float]],
    cluster: ClusterConfig,
    actors: ActorPool | None = None,
) -> None:
    """Raises UserError if there is no place for the workers and for Ray Data.

    Args:
        nodes: resources of each node, by Ray's names.
        actors: scoring actors that run at the same time as the workers.
    """
    # All nodes together.
    available = Counter[str]()
    for node in nodes:
        available.update(node)
    needed = {"CPU": cluster.num_workers * cluster.cpus_per_worker + DATA_CPUS}
    if cluster.use_gpu:
        needed["GPU"] = cluster.num_workers * cluster.gpus_per_worker
    if actors is not None:
        needed["CPU"] += actors.min_size * actors.num_cpus
        if actors.num_gpus:
            needed["GPU"] = needed.get("GPU", 0) + actors.min_size * actors.num_gpus
    for resource, amount in needed.items():
        if amount > available[resource]:
            reason = f"the cluster has {available[resource]:g} {resource}s in all"
            if resource == "CPU":
                reason += f", and feeding the workers needs {DATA_CPUS:g} of them"
            if actors is not None:
                reason += (
                    f"; margins.mode: stream needs {amount:g} with those of the scoring actors: "
                    "see scoring.min_actors, scoring.gpus_per_actor and cluster.gpus_per_worker"
                )
            if not available[resource] and resource == "GPU":
                raise UserError(
                    f"cluster.use_gpu: true needs GPUs, and {reason}. {NO_GPUS}{IF_NODES_COME}"
                )
            raise UserError(explain_too_many(cluster, reason) + IF_NODES_COME)

    # Each worker has to fit on one node.
    places = sum(_places_on(node, cluster.worker_resources) for node in nodes)
    if places < cluster.num_workers:
        reason = f"the {len(nodes)} nodes have places for {places} such workers, each on one node"
        raise UserError(explain_too_many(cluster, reason) + IF_NODES_COME)


def check_actors(nodes: Sequence[Mapping[str, float]], actors: ActorPool) -> None:
    """Raises UserError if there is no place for the actors that a pass starts with."""
    resources = {"CPU": actors.num_cpus}
    if actors.num_gpus:
        resources["GPU"] = actors.num_gpus
    places = sum(_places_on(node, resources) for node in nodes)
    if places < actors.min_size:
        raise UserError(
            f"scoring.min_actors: {actors.min_size} actors of {actors.num_cpus:g} CPUs and "
            f"{actors.num_gpus:g} GPUs can never be placed: the {len(nodes)} nodes have places for "
            f"{places}, each on one node. Lower min_actors, cpus_per_actor or gpus_per_actor"
            + IF_NODES_COME
        )

    # Tasks that read pairs need a CPU, too; without one the pass never ends.
    available = sum(node.get("CPU", 0) for node in nodes)
    needed = actors.min_size * actors.num_cpus + READ_CPUS
    if needed > available:
        raise UserError(
            f"scoring.min_actors: {actors.min_size} actors of {actors.num_cpus:g} CPUs leave "
            f"none of the cluster's {available:g} CPUs to read pairs with. Lower min_actors or "
            "cpus_per_actor" + IF_NODES_COME
        )


def _places_on(node: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many workers or actors with such resources fit on one node."""
    return min(_count_shares(node.get(name, 0), name, share) for name, share in resources.items())


def _count_shares(available: float, name: str, share: float) -> int:
    """How often a share fits; one of a GPU is of a single GPU."""
    if name == "GPU" and share < 1:
        return math.floor(available) * math.floor(1 / share)
    return math.floor(available / share)


def explain_too_many(cluster: ClusterConfig, reason: str) -> str:
    keys = "num_workers, cpus_per_worker or gpus_per_worker"
    if not cluster.use_gpu:
        keys = "num_workers or cpus_per_worker"
    return (
        f"cluster.num_workers: {cluster.num_workers} workers of {cluster.worker_description} can "
        f"never be placed: {reason}. Lower {keys}"
    )
