"""Reference log-probs for tables of tokenised pairs."""

from pathlib import Path

import pyarrow as pa
import torch

from madpo_ray.columns import REF_LOGPS
from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.scoring.scorers import PolicyLogps


def with_reference(
    table: pa.Table, folder: Path, model: ModelConfig, *, batch_size: int = 8
) -> pa.Table:
    """The table with a model's log-probs as the reference's."""
    scorer = PolicyLogps(folder, model, columns=REF_LOGPS, forward=ForwardOptions(batch_size))
    scorer.load(torch.device("cpu"))
    for name, values in zip(REF_LOGPS, scorer(table), strict=True):
        table = table.append_column(name, pa.array(values))
    return table
