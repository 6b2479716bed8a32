"""Rewards of samples, from a judge that reads texts."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from madpo_ray.columns import PROMPT
from madpo_ray.data.messages import Content, from_text
from madpo_ray.errors import UserError
from madpo_ray.evaluation.sample_sets import SampleSet
from madpo_ray.scoring.judges import TextScorer
from madpo_ray.scoring.reasons import UnscorableRows


class JudgedSamples:
    """A scorer of samples: the judge's reward of each.

    A sample is a text after a prompt that is a text, and an assistant's message after messages.
    One that the judge cannot read ends the pass.
    """

    def __init__(self, sampled: Sequence[SampleSet], judge: TextScorer) -> None:
        self._sampled = sampled
        self._judge = judge
        self.reads = (PROMPT, *(one.text for one in sampled))
        self.columns = tuple(one.reward for one in sampled)

    def load(self, device: torch.device) -> None:
        self._judge.load(device)

    def __call__(self, rows: pa.Table) -> np.ndarray:
        """(C, P), float64."""
        prompts = rows[PROMPT].to_pylist()
        samples = [
            list(zip(prompts, rows[one.text].to_pylist(), strict=True)) for one in self._sampled
        ]
        # Each once: in another batch the same text may have a reward that differs in its last bits,
        # and would win or lose against itself.
        distinct = list(dict.fromkeys(sample for own in samples for sample in own))
        contents = [from_text(prompt) for prompt, _ in distinct]
        completions = [
            _after(content, text) for content, (_, text) in zip(contents, distinct, strict=True)
        ]
        try:
            rewards = self._judge.rewards(contents, completions)
        except UnscorableRows as error:
            raise UserError(f"{error}; lower evaluate.max_new_tokens") from None
        reward_of = dict(zip(distinct, rewards, strict=True))
        return np.array([[reward_of[sample] for sample in own] for own in samples])


def _after(prompt: Content, text: str) -> Content:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
