"""What a training makes of Ray Train's errors."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
import ray.train
import torch

from madpo_ray.config import ClusterConfig
from madpo_ray.errors import ExitCode, Stopped, StoppedForGood, UserError
from madpo_ray.training.checkpoints import CheckpointWriteError
from madpo_ray.training.protocols import NonFiniteError
from madpo_ray.training.trainer import end_if_certain, failure_cause, is_preemption

FOLDER = Path("/tmp")
LOST: Any = ray.exceptions.ActorDiedError()
BROKEN = ValueError("a shape\nin two lines")


def of_ranks(**failures: Exception) -> ray.train.WorkerGroupError:
    by_rank = {int(rank[1:]): failure for rank, failure in failures.items()}
    return ray.train.WorkerGroupError("text", by_rank)


def test_error_of_code_would_come_again() -> None:
    assert failure_cause(of_ranks(r0=BROKEN, r1=BROKEN)) == ("ValueError: a shape", True)


def test_lost_worker_is_thefailure_cause() -> None:
    """Whatever the other ranks raise because it does not answer."""
    cause, is_deterministic = failure_cause(of_ranks(r0=BROKEN, r1=LOST))
    assert cause.startswith("ActorDiedError: ")
    assert not is_deterministic


def test_full_disk_is_not_tried_again() -> None:
    error = of_ranks(r0=RuntimeError("a rank was lost"), r1=CheckpointWriteError("no space in /a"))
    with pytest.raises(Stopped) as caught:
        end_if_certain(error, ClusterConfig(), FOLDER)
    assert caught.value.message == "no space in /a"
    assert caught.value.exit_code is ExitCode.FAILED
    end_if_certain(of_ranks(r0=BROKEN), ClusterConfig(), FOLDER)


def test_full_disk_outside_of_a_checkpoint_is_found() -> None:
    error = of_ranks(r0=OSError(errno.ENOSPC, "No space left on device", "/a/metrics.jsonl"))
    with pytest.raises(Stopped, match=r"metrics\.jsonl cannot be read or written: No space left"):
        end_if_certain(error, ClusterConfig(), FOLDER)


def test_error_for_the_user_reaches_the_user() -> None:
    error = of_ranks(r0=RuntimeError("a rank was lost"), r1=UserError("the model cannot be read"))
    with pytest.raises(UserError, match="the model cannot be read"):
        end_if_certain(error, ClusterConfig(), FOLDER)
    with pytest.raises(Stopped, match="the loss is NaN"):
        end_if_certain(of_ranks(r0=NonFiniteError("the loss is NaN")), ClusterConfig(), FOLDER)
    full = torch.OutOfMemoryError("CUDA out of memory\nand so on")
    with pytest.raises(Stopped, match=r"\(CUDA out of memory\): lower per_device_train") as caught:
        end_if_certain(of_ranks(r0=BROKEN, r1=full), ClusterConfig(), FOLDER)
    # A search tries such a trial again: on another machine it may fit.
    assert not isinstance(caught.value, StoppedForGood)


def test_preemption_is_no_failure() -> None:
    """Announced, or found by the health check."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    preempted = ray.exceptions.RayActorError(preempted=True)
    assert is_preemption(of_ranks(r0=WorkerHealthCheckFailedError("lost", preempted)))
    assert not is_preemption(of_ranks(r0=WorkerHealthCheckFailedError("lost", LOST)))
    info: Any = SimpleNamespace(preempted_ranks=[0])
    assert is_preemption(ray.train.PreemptionError(info))


def test_workers_without_a_place_end_with_the_time() -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    error = ray.train.ControllerError(WorkerGroupStartupTimeoutError(2))
    with pytest.raises(Stopped, match="the 3 workers were not placed within"):
        end_if_certain(error, ClusterConfig(num_workers=3), FOLDER)
