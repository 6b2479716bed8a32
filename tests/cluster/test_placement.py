"""Room for workers and actors on nodes."""

import pytest

from madpo_ray.cluster.placement import check_actors, check_nodes, count_trainings
from madpo_ray.config import ActorPool, ClusterConfig
from madpo_ray.errors import UserError


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


def test_cluster_without_gpus_is_told_apart() -> None:
    """Fewer workers would not help."""
    cluster = ClusterConfig(use_gpu=True)
    message = r"cluster\.use_gpu: true needs GPUs, and the cluster has 0 GPUs.*use_gpu: false"
    with pytest.raises(UserError, match=message):
        check_nodes([{"CPU": 8.0}], cluster)
    message = "has 1 GPUs in all. Lower num_workers, cpus_per_worker or gpus_per_worker"
    with pytest.raises(UserError, match=message):
        check_nodes([{"CPU": 8.0, "GPU": 1.0}], cluster.model_copy(update={"num_workers": 2}))
