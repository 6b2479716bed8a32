"""A micro-batch of four pairs with known log-probs."""

from typing import Any

import torch
from torch import Tensor

from madpo_ray.columns import MARGIN, REF_LOGPS
from madpo_ray.data.batching import MicroBatch, collate

COLUMNS = (MARGIN, *REF_LOGPS)
CHOSEN_LENGTHS = torch.tensor([1, 2, 3, 4])
REJECTED_LENGTHS = torch.tensor([4, 3, 2, 1])


def synthetic(columns: tuple[str, ...] = COLUMNS) -> tuple[dict[str, Tensor], MicroBatch, Tensor]:
    """Outputs of a model, the micro-batch, and the pairs' log-ratios (4,)."""
    rows: list[dict[str, Any]] = []
    for i, margin in enumerate([-8.0, -1.0, 0.5, 9.0]):
        rows.append(
            {
                "prompt_ids": [1],
                "chosen_ids": [2] * (i + 1),
                "rejected_ids": [3] * (4 - i),
                "margin": margin,
                "ref_chosen_logps": -5.0 - i,
                "ref_rejected_logps": -7.0,
            }
        )
    batch = collate(rows, packed=True, column_names=columns)
    logps = torch.randn(8, generator=torch.Generator().manual_seed(0)) - 6
    chosen, rejected = (logps - reference_logps(batch)).chunk(2)
    outputs = {"logps": logps, "entropy": torch.arange(1.0, 9.0)}
    return outputs, batch, chosen - rejected


def reference_logps(batch: MicroBatch) -> Tensor:
    """(8,), chosen first."""
    return torch.cat([batch.columns[name] for name in REF_LOGPS]).float()
