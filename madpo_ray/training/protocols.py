"""What the training loop talks to, and what a loss reads. No loss, no Ray, no DeepSpeed.

Legend: B pairs of a micro-batch.
"""

import abc
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from madpo_ray.columns import MARGIN, REF_LOGPS
from madpo_ray.data.batching import MicroBatch
from madpo_ray.training.metrics import Metric, evaluation_of
from madpo_ray.training.schedule import Progress


class BatchBeta(NamedTuple):
    """beta-DPO's choice for one micro-batch."""

    beta: Tensor  # scalar
    # (B,): 0 for a filtered pair, else pairs / kept pairs, so that the mean over all pairs is the
    # mean over kept ones.
    factor: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Log-probs of a micro-batch's pairs, each (B,), and what follows from them."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    lengths: Tensor  # (2B,) response tokens, chosen first
    columns: Mapping[str, Tensor]  # name -> (B,) float64, such as margin
    batch_beta: BatchBeta | None = None  # in training with beta-DPO

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor], batch: MicroBatch) -> "PairBatch":
        """From a policy's outputs and the stored columns of a micro-batch."""
        chosen, rejected = outputs["logps"].chunk(2)
        ref_chosen, ref_rejected = REF_LOGPS
        return cls(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=batch.columns[ref_chosen].to(chosen.dtype),
            ref_rejected=batch.columns[ref_rejected].to(chosen.dtype),
            lengths=batch.response_lengths,
            columns=batch.columns,
        )

    @property
    def margin(self) -> Tensor | None:
        """The reward margin, float64; None if no reward model scored the pairs."""
        return self.columns.get(MARGIN)

    @property
    def logratio(self) -> Tensor:
        """Of chosen minus rejected, in nats."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    @property
    def chosen_lengths(self) -> Tensor:
        return self.lengths.chunk(2)[0]

    @property
    def length_normalised(self) -> Tensor:
        """The difference of log-ratios, each divided by its own response's length."""
        chosen_lengths, rejected_lengths = self.lengths.chunk(2)
        chosen = (self.chosen - self.ref_chosen) / chosen_lengths
        rejected = (self.rejected - self.ref_rejected) / rejected_lengths
        return chosen - rejected


class Statistics(abc.ABC):
    """What a loss carries from step to step."""

    @abc.abstractmethod
    def observe(self, pairs: PairBatch, valid: Tensor) -> PairBatch:
        """The pairs with what the loss needs of the statistics. `valid` is (B,) bool."""

    @abc.abstractmethod
    def end_step(self) -> None:
        """Called once after each optimizer step."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Terms(NamedTuple):
    """What an objective makes of a micro-batch."""

    loss: Tensor  # (B,)
    metrics: dict[str, Metric]  # name -> values (B,) and how to reduce them


class Objective(abc.ABC):
    """A loss with its metrics. One that carries nothing from step to step needs only `__call__`."""

    @abc.abstractmethod
    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        """Loss and metrics of each pair. In evaluation running statistics stay as they are."""

    def end_step(self) -> None:  # noqa: B027 (most objectives have nothing to do)
        """Called once after each optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, "the checkpoint belongs to another objective"


class Engine(Protocol):
    """Forward, backward and optimizer of this rank's part of the model."""

    module: nn.Module
    device: torch.device

    def train(self) -> None: ...

    def eval(self) -> None: ...

    def __call__(self, batch: MicroBatch) -> dict[str, Tensor]: ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`, summed over ranks and micro-batches of the step."""

    def step(self) -> float:
        """One optimizer step; the gradient norm before clipping, over all ranks.

        If the norm is not finite, the optimizer has not moved.
        """

    def learning_rate(self) -> float:
        """Of the next step."""


class Reporter(Protocol):
    """Where a run's numbers and checkpoints go."""

    def log(self, progress: Progress, metrics: dict[str, float]) -> None: ...

    def publish(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None: ...

    def last_checkpoint(self) -> str:
        """Where the newest checkpoint is, in words."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite. Names the step, its pairs and the last good checkpoint."""


class Notice(enum.IntEnum):
    """A request to save or stop, checked between steps.

    The most severe one on any rank applies to all.
    """

    NONE = 0
    SAVE = 1  # a node will be preempted: save and continue
    OUT_OF_TIME = 2  # save and exit
    TERMINATED = 3  # save and exit


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int  # whose weights are the result
    notice: Notice = Notice.NONE  # to exit, if it got one before its end
    note: str = ""  # what a user may want to know of how it ran

    def evaluation(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of that step's evaluation. Raises RuntimeError if it was lost."""
        line = evaluation_of(metrics, self.step)
        if line is None:
            raise RuntimeError(f"the metrics have no evaluation of step {self.step}")
        return line


class Site(Protocol):
    """Where a rank runs: its place among the ranks, and its rows."""

    rank: int
    world_size: int

    def micro_batches(self, start_step: int) -> Iterator[pa.Table]:
        """This rank's encoded micro-batches, from a step on; earlier ones may come first."""

    def report(self, numbers: dict[str, float]) -> None:
        """Passes numbers to whoever started the run, once all ranks are here. A barrier."""

    def node_is_leaving(self) -> bool:
        """Whether a node of the run is about to be taken away. A barrier."""
