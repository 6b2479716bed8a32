"""Processes that train a job over gloo, as Ray's workers do, without Ray."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from madpo_ray.errors import UserError
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.metrics import read_metrics
from madpo_ray.training.protocols import Outcome
from madpo_ray.training.rank import run_rank
from madpo_ray.training.sites import LocalSite, join_ranks

MakeJob = Callable[..., TrainingJob]
TrainOn = Callable[[TrainingJob, int], Outcome]

# What a rank imports for seconds. The first imports torch's compiler, as DeepSpeed does when it
# starts under ZeRO.
PRELOAD = [
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.optimization",
    "transformers.models.llama.modeling_llama",
    "peft.tuners",
    "torch.utils.tensorboard",
    "madpo_ray.training.rank",
    "support.faults",
]
# Nothing is too small to be sharded.
SHARDED = {"zero_stage": 3, "stage3_param_persistence_threshold": 0}
THIRTY_STEPS = {"max_steps": 30, "num_train_epochs": 9, "learning_rate": 1e-3}


def _be_a_rank(job: TrainingJob, rank: int, world_size: int, store: str, outcomes: Any) -> None:
    join_ranks(rank, world_size, Path(store))
    try:
        outcomes.put(run_rank(job, LocalSite(job)))
    except (RuntimeError, UserError) as error:
        outcomes.put(str(error))
        raise
    dist.destroy_process_group()


class Ranks:
    """A job on a number of ranks: started in a second, and killed."""

    def __init__(self, job: TrainingJob, world_size: int, folder: Path) -> None:
        # CUDA does not survive a fork of a process that imported DeepSpeed, which asks for devices.
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        if torch.cuda.device_count():
            context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(dir=folder)
        self._outcomes = context.Queue()
        self.processes = [
            context.Process(target=_be_a_rank, args=(job, rank, world_size, store, self._outcomes))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def join(self) -> list[int | None]:
        """Waits for the end; the exit codes, negative for a signal."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def outcome(self) -> Outcome:
        """Waits, and gives what all ranks returned."""
        codes = self.join()
        assert codes == [0] * len(codes), codes
        outcomes = [self._outcomes.get(timeout=10) for _ in codes]
        assert outcomes == [outcomes[0]] * len(codes)
        first: Outcome = outcomes[0]
        return first

    def errors(self) -> list[str]:
        """Waits, and gives the error of each rank."""
        codes = self.join()
        assert codes == [1] * len(codes), codes
        return [self._outcomes.get(timeout=10) for _ in codes]

    def kill_when(self, is_ready: Callable[[], Any]) -> None:
        """kill -9 of all ranks once something is there."""
        while not is_ready():
            assert all(process.is_alive() for process in self.processes)
            time.sleep(0.005)
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        assert self.join() == [-signal.SIGKILL] * len(self.processes)

    def kill_at(self, job: TrainingJob, step: int, victims: list[int], *, delay_s: float) -> None:
        """kill -9 of some ranks, `delay_s` after the metrics first show a step."""
        while not any(line["step"] >= step for line in metrics_of(job)):
            assert any(process.is_alive() for process in self.processes)
            time.sleep(0.002)
        time.sleep(delay_s)
        for rank in victims:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)


def metrics_of(job: TrainingJob) -> list[dict[str, Any]]:
    return read_metrics(job.metrics / "metrics.jsonl")


def logged(job: TrainingJob, name: str = "loss") -> torch.Tensor:
    """The logged values of a metric, in order."""
    return torch.tensor([line[name] for line in metrics_of(job) if name in line])


def weights_of(job: TrainingJob) -> dict[str, torch.Tensor]:
    return load_file(job.output / "model" / "model.safetensors")


def assert_same_weights(one: TrainingJob, other: TrainingJob) -> None:
    """Bitwise."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
