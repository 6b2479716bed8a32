"""Ray Data actors that score pairs with a reward model, a language model, or both in one pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from madpo_ray.batching import collate
from madpo_ray.cluster import actor_pool, num_threads
from madpo_ray.config import ClusterConfig, ModelConfig
from madpo_ray.logprobs import PairLogps, PairRewards
from madpo_ray.models import load_policy, load_reward_model, shares_prefix
from madpo_ray.plan import TOKEN_COLUMNS


class PairScorer:
    """Adds columns to batches of tokenised pairs; a model is loaded once per actor.

    `reward_model` adds `chosen_reward` and `rejected_reward`, in the model's own units; `policies` maps a prefix to a
    folder and adds `{prefix}chosen_logps` and `{prefix}rejected_logps`, summed over response tokens. All float64
    columns.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        micro_batch_size: int,
        num_threads: int,
        reward_model: Path | None = None,
        policies: dict[str, Path] | None = None,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._micro_batch_size, self._model = micro_batch_size, model
        self._modules: list[tuple[str, torch.nn.Module, bool]] = []
        if reward_model is not None:
            self._add("reward", PairRewards(load_reward_model(reward_model, model)))
        for prefix, folder in (policies or {}).items():
            self._add(prefix, PairLogps(load_policy(folder, model)))

    def _add(self, name: str, module: torch.nn.Module) -> None:
        shared = shares_prefix(module.model, self._model)  # type: ignore[arg-type]
        self._modules.append((name, module.to(self._device).eval(), shared))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.select(list(TOKEN_COLUMNS)).to_pylist()
        order = sorted(range(len(rows)), key=lambda i: -sum(len(rows[i][name]) for name in TOKEN_COLUMNS))
        groups = [order[i : i + self._micro_batch_size] for i in range(0, len(order), self._micro_batch_size)]
        for name, module, shared in self._modules:
            scores = self._score(module, [[rows[i] for i in group] for group in groups], shared)
            unsorted = np.full((2, len(rows)), np.nan)
            unsorted[:, order] = scores
            for side, values in zip(("chosen", "rejected"), unsorted, strict=True):
                column = f"{side}_reward" if name == "reward" else f"{name}{side}_logps"
                _refuse_gaps(column, values, table)
                table = table.append_column(column, pa.array(values))
        return table

    @torch.no_grad()
    def _score(self, module: torch.nn.Module, groups: Sequence[Sequence[dict[str, Any]]], shared: bool) -> np.ndarray:
        """Scores (2, pairs) in the order of the groups, chosen first."""
        scores = []
        for group in groups:
            batch = collate(group, shared_prefix=shared).to(self._device)
            outputs = module(batch)
            values = outputs["rewards"] if "rewards" in outputs else outputs["logps"]  # (2B,)
            scores.append(values.double().cpu().view(2, -1))
        return torch.cat(scores, dim=1).numpy()


def _refuse_gaps(column: str, values: np.ndarray, table: pa.Table) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        ids = table["pair_id"].take(bad[:5]).to_pylist()
        raise RuntimeError(f"{column} is not finite for {len(bad)} pairs, such as {ids}")


# Blocks of an actor, at least: one slow block at the end then costs a quarter of an actor's work, not all of it.
BLOCKS_PER_ACTOR = 4


def score_dataset(dataset: Any, cluster: ClusterConfig, *, num_rows: int, batch_size: int, **scorer: Any) -> Any:
    """A Ray dataset of `num_rows` pairs with the scorer's columns, from a pool of `cluster.num_workers` actors."""
    blocks = cluster.num_workers * BLOCKS_PER_ACTOR
    rows_per_block = max(1, min(batch_size, -(-num_rows // blocks)))
    return dataset.repartition(target_num_rows_per_block=rows_per_block).map_batches(
        PairScorer,
        fn_constructor_kwargs={"num_threads": num_threads(cluster), **scorer},
        batch_size=rows_per_block,
        batch_format="pyarrow",
        **actor_pool(cluster),
    )
