"""Rewards from others: a sequence classifier that was not trained here, or a Python function.

They read a pair's texts or messages, as stage `pairs` stores them, not its token ids.
"""

import abc
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from madpo_ray.columns import CHOSEN, PROMPT, REJECTED, REWARDS, TEXT_COLUMNS
from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.data.messages import Content, from_text
from madpo_ray.errors import UserError
from madpo_ray.models.loading import READS_END, load_classifier, load_tokenizer
from madpo_ray.scoring.batches import cut_into_batches
from madpo_ray.scoring.reasons import UnscorableRows

logger = logging.getLogger(__name__)

# Two texts, to compare a batch with single rows.
PROBES = ("What is the capital of France?", "Name a colour that you like, and say why you like it.")
# Largest relative difference between a batch's rewards and those of single rows. A logit in
# bfloat16 between 4 and 8 is a multiple of 1/32.
TOLERANCE, TOLERANCE_IN_BFLOAT16 = 1e-2, 5e-2


class TextScorer(abc.ABC):
    """Scores each response of a pair from its prompt and its text."""

    reads = TEXT_COLUMNS
    columns = REWARDS

    def __call__(self, rows: pa.Table) -> np.ndarray:
        prompts, chosen, rejected = (
            [from_text(text) for text in rows[name].to_pylist()]
            for name in (PROMPT, CHOSEN, REJECTED)
        )
        return np.stack([self.rewards(prompts, chosen), self.rewards(prompts, rejected)])

    @abc.abstractmethod
    def load(self, device: torch.device) -> None:
        """Loads what it needs; called once before the first rows."""

    @abc.abstractmethod
    def rewards(self, prompts: Sequence[Content], completions: Sequence[Content]) -> np.ndarray:
        """One reward per completion, float64."""


class FunctionReward(TextScorer):
    """Rewards of a Python function with TRL's signature: f(prompts=..., completions=...) -> floats.

    Texts are strings, conversations lists of messages.

    Args:
        name: `module:function`.
        key: of the config, for messages.
    """

    def __init__(self, name: str, *, key: str) -> None:
        self._name = name
        self._key = key

    def load(self, device: torch.device) -> None:
        self._function = find_function(self._name, self._key)

    def rewards(self, prompts: Sequence[Content], completions: Sequence[Content]) -> np.ndarray:
        values = self._function(prompts=list(prompts), completions=list(completions))
        rewards = np.array([float(value) for value in values])
        if rewards.shape != (len(prompts),):
            raise UserError(
                f"{self._key}: {self._name} gave {len(rewards)} rewards for {len(prompts)} "
                "completions"
            )
        return rewards


def find_function(name: str, key: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        UserError: there is none.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{key}: {name} cannot be imported ({error}): put its folder on PYTHONPATH"
        ) from None
    if not callable(function):
        raise UserError(f"{key}: {name} is not a function")
    return function  # type: ignore[no-any-return]


class ClassifierReward(TextScorer):
    """Rewards of a sequence classifier with one label: its logit.

    It has its own tokenizer, chat template and dtype. Rows are read as `cut_into_batches`
    says, or one by one if a batch does not give the same numbers.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        *,
        forward: ForwardOptions,
        key: str,
    ) -> None:
        self._key = key
        self._folder = folder
        self._model_config = model
        self._forward_options = forward

    def load(self, device: torch.device) -> None:
        self._device = device
        self._tokenizer = load_tokenizer(self._folder, self._model_config)
        model: Any = load_classifier(
            self._folder,
            self._model_config,
            device=device,
            over_gpus=self._forward_options.over_gpus,
        )
        self._model = model.eval()
        self._end = self._tokenizer.eos_token_id
        config: Any = self._model.config.get_text_config()
        # The tokenizer's limit is lower where positions do not start at 0.
        limits = (
            getattr(config, "max_position_embeddings", None),
            self._tokenizer.model_max_length,
        )
        self._max_tokens = min(limit for limit in limits if limit is not None)
        self._padding = self._find_padding(config)
        if self._padding is None:
            logger.warning(
                "%s gives other rewards in a batch than alone: it reads one text at a time",
                self._folder,
            )

    def _find_padding(self, config: Any) -> int | None:
        """The token to pad a batch with, so that it gives the rewards of single rows."""
        eos = self._tokenizer.eos_token_id
        rows = [self._tokenizer(text)["input_ids"] for text in PROBES]
        rows += [[*row, eos] for row in rows if eos is not None]  # as chat templates end
        expected = np.array([self._forward([row], 0)[0] for row in rows])
        own = config.pad_token_id
        is_coarse = self._model.dtype == torch.bfloat16
        tolerance = TOLERANCE_IN_BFLOAT16 if is_coarse else TOLERANCE
        for padding in (own, self._tokenizer.pad_token_id):
            if padding is None:
                continue
            self._model.config.pad_token_id = config.pad_token_id = padding
            if np.allclose(self._forward(rows, padding), expected, rtol=tolerance, atol=tolerance):
                return int(padding)
        self._model.config.pad_token_id = config.pad_token_id = own
        return None

    def rewards(self, prompts: Sequence[Content], completions: Sequence[Content]) -> np.ndarray:
        rows = [
            self._tokenize(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        self._require_short(rows)
        forward = self._forward_options
        if self._padding is None:
            forward = ForwardOptions(1)
        rewards = np.full(len(rows), np.nan)
        lengths = np.array([len(row) for row in rows])
        for members in cut_into_batches(
            lengths, forward.micro_batch_size, forward.max_tokens, padded=True
        ):
            rewards[members] = self._forward([rows[i] for i in members], self._padding or 0)
        return rewards

    def _tokenize(self, prompt: Content, completion: Content) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(prompt, str) and isinstance(completion, str):
            ids: list[int] = tokenizer(prompt + completion)["input_ids"]
            if getattr(self._model.config, READS_END, False) and ids[-1:] != [self._end]:
                ids.append(self._end)
        else:
            assert isinstance(prompt, list)
            assert isinstance(completion, list)
            if not tokenizer.chat_template:
                raise UserError(
                    f"{self._key}: the pairs are messages, and the tokenizer of {self._folder} "
                    "has no chat template: save model and tokenizer into a folder, with the "
                    "template that it was trained with as chat_template.jinja, and give the folder"
                )
            text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _require_short(self, rows: Sequence[Sequence[int]]) -> None:
        """Raises UnscorableRows if the model cannot read some of the rows."""
        too_long = {
            place: f"too long for {self._key}: {len(ids)} tokens, and {self._folder} reads "
            f"{self._max_tokens} (a lower data.max_length with data.over_length: drop leaves such "
            "pairs out)"
            for place, ids in enumerate(rows)
            if len(ids) > self._max_tokens
        }
        if too_long:
            raise UnscorableRows(too_long)

    @torch.no_grad()
    def _forward(self, rows: Sequence[Sequence[int]], padding: int) -> np.ndarray:
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), padding)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        logits = self._model(
            input_ids=input_ids.to(self._device), attention_mask=attention_mask.to(self._device)
        ).logits
        rewards: np.ndarray = logits[:, 0].double().cpu().numpy()
        return rewards
