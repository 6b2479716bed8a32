"""Rewards of samples: each is judged with its own prompt."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from madpo_ray.data.messages import Content
from madpo_ray.evaluation.judged import JudgedSamples
from madpo_ray.evaluation.sample_sets import SampleSet
from madpo_ray.scoring.judges import FunctionReward, TextScorer

ONE, OTHER = SampleSet("policy", 1.0), SampleSet("policy", 0.0)


def test_each_sample_has_a_reward() -> None:
    scorer = JudgedSamples(
        [ONE, OTHER], FunctionReward("support.judges:count_kind_words", key="evaluate.judge")
    )
    scorer.load(torch.device("cpu"))
    table = pa.table(
        {"prompt": ["a", "b"], ONE.text: ["good", "bad"], OTHER.text: ["bad dog", "great dog"]}
    )
    assert scorer.columns == (ONE.reward, OTHER.reward)
    assert scorer(table).tolist() == [[1.0, -1.0], [-2.0, 0.0]]


class Recorder(TextScorer):
    """A judge that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Content, Content]] = []

    def load(self, device: torch.device) -> None:
        pass

    def rewards(self, prompts: Sequence[Content], completions: Sequence[Content]) -> np.ndarray:
        self.asked += zip(prompts, completions, strict=True)
        return np.zeros(len(prompts))


def test_messages_are_answered_by_an_assistant() -> None:
    judge = Recorder()
    turns = [{"role": "user", "content": "hello"}]
    table = pa.table({"prompt": [json.dumps(turns), "hello"], ONE.text: ["hi", "hi"]})
    JudgedSamples([ONE], judge)(table)
    assert judge.asked == [(turns, [{"role": "assistant", "content": "hi"}]), ("hello", "hi")]
