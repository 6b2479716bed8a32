"""What gives numbers to pairs or responses. A scorer knows no Ray; actors load it once each.

Legend: C columns of a scorer, P rows of a table, R responses per row (chosen and rejected).
"""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from madpo_ray.columns import GROUP_HASH, MARGIN_STD, PROMPT_IDS, RESPONSE_IDS, REWARDS
from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.data.splits import folds_of
from madpo_ray.errors import UserError
from madpo_ray.models.loading import load_policy, load_reward_model
from madpo_ray.models.logprobs import ResponseLogps, ResponseRewards
from madpo_ray.models.reading import find_reading
from madpo_ray.scoring.batches import Batches, Layout
from madpo_ray.scoring.chunks import RAISED
from madpo_ray.scoring.reasons import UnscorableRows


class Scorer(Protocol):
    """Numbers of a row: one per response, chosen first, or of the pair.

    Made in the driver and pickled to each actor, where it is loaded once.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of the rows that it needs."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it adds, (C,)."""

    def load(self, device: torch.device) -> None:
        """Loads what it needs; called once before the first rows."""

    def __call__(self, rows: pa.Table) -> np.ndarray:
        """Scores (C, P) of a table of P rows, float64."""


def score_or_explain(scorer: Scorer, rows: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Scores (C, P), and a reason for each row that has none ("" for the others).

    If the scorer fails for a table, it is tried row by row; if it names rows, without them.

    Raises:
        UserError: the scorer refuses all rows. Memory and device errors are raised as they are: no
            single row causes them.
    """
    num_rows = rows.num_rows
    try:
        scores = scorer(rows)
    except UnscorableRows as error:
        reasons = [error.reasons.get(place, "") for place in range(num_rows)]
        others = np.flatnonzero([not reason for reason in reasons])
        scores = np.full((len(scorer.columns), num_rows), np.nan)
        if len(others):
            scores[:, others], own = score_or_explain(scorer, rows.take(others))
            for place, reason in zip(others.tolist(), own, strict=True):
                reasons[place] = reason
        return scores, reasons
    except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # a callable, or a tokenizer, may raise anything about one row
        if num_rows == 1:
            reason = f"{RAISED}{type(error).__name__}: {error}"
            return np.full((len(scorer.columns), 1), np.nan), [reason]
        parts = [score_or_explain(scorer, rows.slice(i, 1)) for i in range(num_rows)]
        reasons = [reason for _, part in parts for reason in part]
        return np.concatenate([part for part, _ in parts], axis=1), reasons

    scores = np.array(scores, dtype=np.float64)
    reasons = [""] * num_rows
    for name, values in zip(scorer.columns, scores, strict=True):
        for i in np.flatnonzero(~np.isfinite(values)):
            reasons[i] = reasons[i] or f"{name} is {values[i]}"
    scores[:, [bool(reason) for reason in reasons]] = np.nan
    return scores, reasons


class ModelScorer(abc.ABC):
    """A scorer that reads token ids of pairs with a transformers model.

    Attributes:
        batches: what the model reads; `share_batches` gives all models of an actor the same.
    """

    reads = (PROMPT_IDS, *RESPONSE_IDS)

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        *,
        columns: tuple[str, ...],
        forward: ForwardOptions,
    ) -> None:
        self.columns = columns
        self._folder = folder
        self._model_config = model
        self._forward = forward
        self.batches = Batches()

    def load(self, device: torch.device) -> None:
        self._device = device
        self._module = self._load_module(device=device, over_gpus=self._forward.over_gpus)
        self._reading = find_reading(self._module, device, self._model_config)

    @torch.no_grad()
    def __call__(self, rows: pa.Table) -> np.ndarray:
        # The device is waited for at the end only.
        order: list[int] = []
        values = []
        layout = Layout.of(RESPONSE_IDS, self._forward, packed=self._reading.packed)
        for members, batch in self.batches.micro_batches(rows, layout):
            outputs = self._module(batch.to(self._device))
            values.append(self._values(outputs).view(len(RESPONSE_IDS), -1))
            order += members
        scores = np.full((len(RESPONSE_IDS), rows.num_rows), np.nan)
        scores[:, order] = torch.cat(values, dim=1).double().cpu().numpy()
        return scores

    @abc.abstractmethod
    def _load_module(self, **placement: Any) -> nn.Module:
        """A module that maps a micro-batch to outputs; its weights go where the loader is told."""

    @abc.abstractmethod
    def _values(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The outputs that are the scores, (R * B,)."""


class PolicyLogps(ModelScorer):
    """Log-probs of responses under a policy, summed over response tokens, in nats.

    Args:
        base: the model that the policy was trained on, if the policy is an adapter.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, *, base: Path | None = None, **options: Any
    ) -> None:
        super().__init__(folder, model, **options)
        self._base = base

    def _load_module(self, **placement: Any) -> nn.Module:
        policy = load_policy(self._folder, self._model_config, base=self._base, **placement)
        return ResponseLogps(policy)

    def _values(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs["logps"]


class TrainedReward(ModelScorer):
    """Rewards of a reward model that stage `reward` trained, in the model's own units."""

    def _load_module(self, **placement: Any) -> nn.Module:
        return ResponseRewards(load_reward_model(self._folder, self._model_config, **placement))

    def _values(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs["rewards"]


class CrossFittedReward:
    """Rewards of several reward models: each pair's of the one that did not see its group.

    Args:
        models: of the folds 0, 1, ...
    """

    reads = (PROMPT_IDS, *RESPONSE_IDS, GROUP_HASH)
    columns = REWARDS

    def __init__(self, models: Sequence[TrainedReward]) -> None:
        self._models = models

    def load(self, device: torch.device) -> None:
        for model in self._models:
            model.load(device)

    def __call__(self, rows: pa.Table) -> np.ndarray:
        folds = folds_of(rows[GROUP_HASH].to_numpy(), len(self._models))
        scores = np.full((len(self.columns), rows.num_rows), np.nan)
        for fold, model in enumerate(self._models):
            members = np.flatnonzero(folds == fold)
            if len(members):
                scores[:, members] = model(rows.take(members))
        return scores


class EnsembleReward:
    """Mean rewards of several reward models, and the standard deviation of their margins.

    The deviation is that of a sample (divided by the number of members less one), in the unit of
    the rewards, which has to be the same for all members.
    """

    columns = (*REWARDS, MARGIN_STD)

    def __init__(self, members: Sequence[Scorer]) -> None:
        self.members = members
        self.reads = tuple(dict.fromkeys(name for one in members for name in one.reads))

    def load(self, device: torch.device) -> None:
        for member in self.members:
            member.load(device)

    def __call__(self, rows: pa.Table) -> np.ndarray:
        rewards = np.stack([member(rows) for member in self.members])  # (members, 2, P)
        deviation = (rewards[:, 0] - rewards[:, 1]).std(axis=0, ddof=1)
        return np.concatenate([rewards.mean(axis=0), deviation[None]])


def share_batches(scorers: Sequence[Scorer]) -> None:
    """Makes the models of some scorers read the same tensors, so that each batch is made once.

    Not those of `CrossFittedReward`, each of which reads other pairs.
    """
    shared = Batches()
    for scorer in scorers:
        for model in _models_of(scorer):
            model.batches = shared


def _models_of(scorer: Scorer) -> Iterator[ModelScorer]:
    match scorer:
        case ModelScorer():
            yield scorer
        case EnsembleReward():
            for member in scorer.members:
                yield from _models_of(member)
