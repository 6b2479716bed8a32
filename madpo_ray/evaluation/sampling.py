"""Sampled responses, from Ray Data actors."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch

from madpo_ray.cluster import actor_pool
from madpo_ray.columns import PROMPT_IDS
from madpo_ray.config import ClusterConfig, ModelConfig
from madpo_ray.models.loading import load_policy, load_tokenizer

INDEX = "index"


class Sampler:
    """Adds `{name}_ids`, and the decoded `{name}`, of each of `policies` to tables of prompts.

    Samples from the model's full distribution at temperature 1, whatever its generation config
    says. The seed of a batch follows from its first row's index, so samples do not depend on which
    actor draws them.
    """

    def __init__(
        self,
        *,
        policies: dict[str, Path],
        model: ModelConfig,
        max_new_tokens: int,
        seed: int,
        num_threads: int,
    ) -> None:
        from transformers import GenerationConfig

        torch.set_num_threads(num_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._seed = seed
        self._tokenizer = load_tokenizer(next(iter(policies.values())), model)
        self._models: dict[str, Any] = {}
        for name, folder in policies.items():
            loaded: Any = load_policy(folder, model).to(self._device).eval()
            loaded.generation_config = GenerationConfig()  # its own may hold penalties and filters
            self._models[name] = loaded

        self._eos = self._tokenizer.eos_token_id
        self._options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": self._eos,
            "pad_token_id": self._eos if self._eos is not None else 0,
        }

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        # Padded on the left: generation continues from the last position of every row.
        prompts = table[PROMPT_IDS].to_pylist()
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        input_ids = torch.tensor(ids, device=self._device)
        attention_mask = torch.tensor(mask, device=self._device)

        for name, model in self._models.items():
            torch.manual_seed(self._seed * 1_000_003 + table[INDEX][0].as_py())
            generated = model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **self._options
            )
            responses = [self._until_end(row) for row in generated[:, width:].tolist()]
            texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
            table = table.append_column(
                f"{name}_ids", pa.array(responses, type=pa.list_(pa.int32()))
            )
            table = table.append_column(name, pa.array(texts))
        return table

    def _until_end(self, ids: list[int]) -> list[int]:
        """The response up to its end-of-sequence token, included."""
        return ids[: ids.index(self._eos) + 1] if self._eos in ids else ids


def sample_responses(
    prompts: pa.Table, cluster: ClusterConfig, *, batch_size: int, **sampler: Any
) -> pa.Table:
    """The table of `prompt_ids` with the sampler's columns, in order.

    Args:
        batch_size: prompts sampled at a time. Part of the seed: another size gives other samples.
        sampler: `Sampler`'s arguments, without num_threads.
    """
    indexed = prompts.append_column(INDEX, pa.array(range(prompts.num_rows)))
    sampled = (
        ray.data.from_arrow(indexed)
        .repartition(target_num_rows_per_block=batch_size)
        .map_batches(
            Sampler,
            fn_constructor_kwargs={"num_threads": cluster.num_threads, **sampler},
            batch_size=batch_size,
            batch_format="pyarrow",
            **actor_pool(cluster),
        )
    )
    tables = list(sampled.iter_batches(batch_format="pyarrow", batch_size=None))
    return pa.concat_tables(tables).sort_by(INDEX)
