"""The running statistics that beta-DPO takes of a micro-batch's pairs.

Legend: B pairs of a micro-batch, N pairs of a micro-batch over all ranks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from madpo_ray.config import PolicyConfig
from madpo_ray.losses import BetaStatistics, beta_dpo_batch
from madpo_ray.training.collectives import gather_valid
from madpo_ray.training.protocols import BatchBeta, PairBatch, Statistics


class BetaDPO(Statistics):
    """One beta and one mask for a micro-batch of all ranks, from running statistics of the gaps.

    `published` follows junkangwu/beta-DPO. `madpo_paper` is the variant of the MADPO authors'
    table: gaps scaled by beta, statistics per optimizer step from (0, 1), beta from the mean over
    all pairs, without a floor.
    """

    def __init__(self, settings: PolicyConfig, seed: int) -> None:
        self._settings = settings
        self._is_paper_variant = settings.beta_dpo_variant == "madpo_paper"
        std = 1.0 if self._is_paper_variant else 0.0
        self._statistics = BetaStatistics(torch.tensor(0.0), torch.tensor(std))
        self._gaps: list[Tensor] = []  # of the optimizer step, over all ranks
        self._generator = torch.Generator().manual_seed(seed)

    def observe(self, pairs: PairBatch, valid: Tensor) -> PairBatch:
        """The pairs with this micro-batch's beta and filter. A collective. `valid` is (B,) bool."""
        settings = self._settings

        # The gaps of all ranks, and the statistics after them.
        scale = settings.beta if self._is_paper_variant else 1.0
        gaps, own = gather_valid(pairs.logratio.detach() * scale, valid)  # (N,)
        if self._is_paper_variant:
            self._gaps.append(gaps)
        else:
            self._statistics = self._statistics.updated(gaps)

        # This micro-batch's beta and filter.
        beta, kept = beta_dpo_batch(
            gaps,
            self._statistics,
            beta=settings.beta,
            a=settings.beta_dpo_a,
            mode_weight=settings.beta_dpo_mode_weight,
            generator=self._generator,
        )
        if self._is_paper_variant and len(gaps):
            shift = gaps.mean() - self._statistics.mean
            beta = settings.beta * (1 + settings.beta_dpo_a * shift)

        # The mean over all pairs becomes the mean over kept ones.
        mask = torch.zeros_like(pairs.chosen)
        mask[valid] = kept[own].to(mask)
        factor = mask * (len(kept) / max(int(kept.sum()), 1))
        return dataclasses.replace(pairs, batch_beta=BatchBeta(beta.to(pairs.chosen), factor))

    def end_step(self) -> None:
        if self._is_paper_variant:
            self._statistics = self._statistics.updated(torch.cat(self._gaps))
            self._gaps = []

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": tuple(self._statistics), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._statistics = BetaStatistics(*state["statistics"])
        self._gaps = []
        self._generator.set_state(state["generator"])
