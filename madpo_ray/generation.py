"""Sampled responses, from Ray Data actors."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from madpo_ray.cluster import actor_pool, num_threads
from madpo_ray.config import ClusterConfig, ModelConfig
from madpo_ray.models import load_policy, load_tokenizer


class Sampler:
    """Adds `{name}_ids`, and the decoded `{name}`, for each of `policies`, to batches with `index` and `prompt_ids`.

    Samples from the model's whole distribution at temperature 1: whatever its generation config says.
    The seed of a batch is its first row's index, so samples do not depend on which actor draws them.
    """

    def __init__(
        self, *, policies: dict[str, Path], model: ModelConfig, max_new_tokens: int, seed: int, num_threads: int
    ) -> None:
        from transformers import GenerationConfig

        torch.set_num_threads(num_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = load_tokenizer(next(iter(policies.values())), model)
        self._models: dict[str, Any] = {
            name: load_policy(folder, model).to(self._device).eval() for name, folder in policies.items()
        }
        for loaded in self._models.values():
            loaded.generation_config = GenerationConfig()  # the model's own may hold penalties and filters
        self._seed = seed
        eos = self._tokenizer.eos_token_id
        self._eos = eos if eos is not None else -1
        self._options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "eos_token_id": eos,
            "pad_token_id": eos if eos is not None else 0,
        }

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        prompts = table["prompt_ids"].to_pylist()
        width = max(map(len, prompts))
        # Padded on the left: generation goes on from the last position of every row.
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        for name, model in self._models.items():
            torch.manual_seed(self._seed * 1_000_003 + table["index"][0].as_py())
            generated = model.generate(input_ids=ids, attention_mask=mask, **self._options)[:, width:].tolist()
            responses = [self._until_end(row) for row in generated]
            texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
            table = table.append_column(f"{name}_ids", pa.array(responses, type=pa.list_(pa.int32())))
            table = table.append_column(name, pa.array(texts))
        return table

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self._eos) + 1] if self._eos in ids else ids


def sample_responses(prompts: pa.Table, cluster: ClusterConfig, *, batch_size: int, **sampler: Any) -> pa.Table:
    """The table of `prompt_ids` with the sampler's columns, in order."""
    import ray.data

    indexed = prompts.append_column("index", pa.array(range(prompts.num_rows)))
    sampled = (
        ray.data.from_arrow(indexed)
        .repartition(target_num_rows_per_block=batch_size)
        .map_batches(
            Sampler,
            fn_constructor_kwargs={"num_threads": num_threads(cluster), **sampler},
            batch_size=batch_size,
            batch_format="pyarrow",
            **actor_pool(cluster),
        )
    )
    tables = list(sampled.iter_batches(batch_format="pyarrow", batch_size=None))
    return pa.concat_tables(tables).sort_by("index")
