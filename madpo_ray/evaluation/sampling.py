"""Sampled responses, from Ray Data actors."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
import torch

from madpo_ray.columns import PROMPT_IDS
from madpo_ray.config import ActorPool, ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.evaluation.sample_sets import PolicyFiles, SampleSet
from madpo_ray.models.devices import refusing_large_batches, refusing_large_models, use_device
from madpo_ray.models.loading import load_policy, load_tokenizer
from madpo_ray.passes import (
    BatchNotes,
    count_gpus,
    pool_options,
    received,
    refused,
    require_no_refusal,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "index"
RESPONSE = "qzxv"  # to find what a chat template writes after it
BATCH_KEY = "evaluate.generation_batch_size (which gives other samples)"


class Sampler:
    """Adds token ids and texts of samples to tables of prompts, in the columns of `SampleSet`.

    Samples from the model's full distribution; its generation config is ignored. The seed of a
    batch follows from its first row's index, so samples do not depend on which actor draws them.
    """

    def __init__(
        self,
        *,
        policies: dict[str, PolicyFiles],
        temperatures: Sequence[float],
        model: ModelConfig,
        max_new_tokens: int,
        seed: int,
        num_threads: int,
        over_gpus: bool = False,
    ) -> None:
        from transformers import GenerationConfig

        torch.set_num_threads(num_threads)
        self._device = use_device(count_gpus())
        self._seed = seed
        self._temperatures = temperatures
        self._tokenizer = load_tokenizer(next(iter(policies.values())).folder, model)

        # The models, and every token that ends a response of theirs.
        self._models: dict[str, Any] = {}
        self._ends: set[int] = set()
        for name, (folder, base) in policies.items():
            loaded: Any = load_policy(
                folder, model, base=base, device=self._device, over_gpus=over_gpus
            )
            loaded.eval()
            self._ends |= end_tokens(self._tokenizer, loaded)
            loaded.generation_config = GenerationConfig()  # its own may hold penalties and filters
            self._models[name] = loaded

        self._options = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": min(self._ends, default=0),
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

        # Each policy at each temperature, from the same seed.
        for name, temperature in itertools.product(self._models, self._temperatures):
            torch.manual_seed(self._seed * 1_000_003 + table[INDEX][0].as_py())
            generated = self._models[name].generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **self._options,
                **_decoding(temperature),
            )
            responses = [self._until_end(row) for row in generated[:, width:].tolist()]
            texts = [
                self._decode(prompt, response)
                for prompt, response in zip(prompts, responses, strict=True)
            ]
            one = SampleSet(name, temperature)
            response_ids = pa.array(responses, type=pa.list_(pa.int32()))
            table = table.append_column(one.ids, response_ids)
            table = table.append_column(one.text, pa.array(texts))
        return table

    def _decode(self, prompt: list[int], response: list[int]) -> str:
        """The response's text. Decoded without its prompt it could lose a space at its start."""
        before, both = self._tokenizer.batch_decode(
            [prompt, prompt + response], skip_special_tokens=True
        )
        if both.startswith(before):
            return str(both[len(before) :])
        return str(self._tokenizer.decode(response, skip_special_tokens=True))

    def _until_end(self, ids: list[int]) -> list[int]:
        """The response up to its first end token, included."""
        end = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[: end + 1]


def _decoding(temperature: float) -> dict[str, Any]:
    """generate's options for a temperature."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model: Any) -> set[int]:
    """Every token that ends a turn, of all the places that may name one.

    The tokenizer's end token, those of the model's config and generation config, and the token that
    the chat template writes after an assistant's message.
    """
    named = [
        tokenizer.eos_token_id,
        getattr(model.config, "eos_token_id", None),
        getattr(model.generation_config, "eos_token_id", None),
        _end_of_turn(tokenizer),
    ]
    ends: set[int] = set()
    for tokens in named:
        if tokens is not None:
            ends.update([tokens] if isinstance(tokens, int) else tokens)
    return ends


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token that the chat template writes after a response; None if there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": RESPONSE}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program of the model's; this one needs other messages
        return None
    after = text.rpartition(RESPONSE)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return next((int(token) for token in ids if token in special), None)


class SamplingActor:
    """A Ray Data actor around a Sampler."""

    def __init__(self, notes: BatchNotes, **sampler: Any) -> None:
        self._notes = notes
        self._refusal = ""
        try:
            with refusing_large_models():
                self._sampler = Sampler(**sampler)
        except UserError as error:
            self._refusal = str(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._refusal:
            return refused(table, self._refusal, key=INDEX)
        first, last = table[INDEX][0], table[INDEX][-1]
        with self._notes.working_on(f"the prompts {first} to {last}"):
            try:
                with refusing_large_batches(BATCH_KEY):
                    return self._sampler(table)
            except UserError as error:
                self._refusal = str(error)
                return refused(table, self._refusal, key=INDEX)


def sample_responses(
    prompts: pa.Table,
    actors: ActorPool,
    *,
    batch_size: int,
    notes: BatchNotes,
    **sampler: Any,
) -> pa.Table:
    """The table of `prompt_ids` with the sampler's columns, in order.

    Args:
        batch_size: prompts sampled at a time. Part of the seed: another size gives other samples.
        sampler: `Sampler`'s arguments, without num_threads.

    Raises:
        UserError: a policy cannot be loaded.
        Stopped: a batch killed its actor again and again.
    """
    indexed = prompts.append_column(INDEX, pa.array(range(prompts.num_rows)))
    options = {"num_threads": actors.num_threads, "notes": notes, **sampler}
    sampled = (
        ray.data.from_arrow(indexed)
        .repartition(target_num_rows_per_block=batch_size)
        .map_batches(
            SamplingActor,
            fn_constructor_kwargs=options,
            batch_size=batch_size,
            batch_format="pyarrow",
            **pool_options(actors),
        )
    )
    with notes.reporting_deaths():
        table = pa.concat_tables(received(sampled, "samples"), promote_options="default")
    require_no_refusal(table)
    return table.sort_by(INDEX)
