"""KL(policy || reference) along the policy's own samples.

Legend: N response tokens, n of a chunk of them, V vocabulary, P rows of a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from madpo_ray.columns import PROMPT_IDS
from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.data.batching import MicroBatch
from madpo_ray.errors import UserError
from madpo_ray.evaluation.comparisons import Values, by_prompt
from madpo_ray.evaluation.sample_sets import PolicyFiles, SampleSet
from madpo_ray.models.loading import load_policy
from madpo_ray.models.logprobs import ResponseLogps, sum_per_response
from madpo_ray.models.reading import find_reading
from madpo_ray.prefetch import prefetched
from madpo_ray.scoring.batches import Layout, make_batches


class DivergenceScorer:
    """A scorer of samples: `kl` and `logratio` of each.

    The policy is as it was sampled from, at its temperature; the reference is at temperature 1. The
    sum over positions of the exact divergence of the next token's distributions has the same mean
    as the log-ratio of the samples, and less noise.

    Args:
        sampled: which samples, of `policies`.
    """

    def __init__(
        self,
        sampled: Sequence[SampleSet],
        policies: Mapping[str, PolicyFiles],
        reference: PolicyFiles,
        model: ModelConfig,
        *,
        forward: ForwardOptions,
    ) -> None:
        self._sampled = sampled
        self._policies = policies
        self._reference_files = reference
        self._model_config = model
        self._forward = forward
        self.reads = (PROMPT_IDS, *(one.ids for one in sampled))
        self.columns = tuple(name for one in sampled for name in (one.kl, one.logratio))

    def load(self, device: torch.device) -> None:
        self._device = device
        self._reference, self._packed = self._load(self._reference_files)
        self._modules: dict[str, ResponseLogps] = {}
        for name in dict.fromkeys(one.policy for one in self._sampled):
            files = self._policies[name]
            if files == self._reference_files:
                self._modules[name] = self._reference
                continue
            self._modules[name], is_packed = self._load(files)
            self._packed = self._packed and is_packed

    def _load(self, files: PolicyFiles) -> tuple[ResponseLogps, bool]:
        policy = load_policy(
            files.folder,
            self._model_config,
            base=files.base,
            device=self._device,
            over_gpus=self._forward.over_gpus,
        )
        module = ResponseLogps(policy)
        return module, find_reading(module, self._device, self._model_config).packed

    @torch.no_grad()
    def __call__(self, rows: pa.Table) -> np.ndarray:
        """(C, P), float64."""
        scores = np.full((len(self._sampled), 2, rows.num_rows), np.nan)
        for number, one in enumerate(self._sampled):
            layout = Layout.of((one.ids,), self._forward, packed=self._packed)
            for members, batch in prefetched(make_batches(rows, layout)):
                found = self._of_batch(one, batch.to(self._device))
                scores[number][:, members] = found.double().cpu().numpy()
        return scores.reshape(-1, rows.num_rows)

    def _of_batch(self, one: SampleSet, batch: MicroBatch) -> Tensor:
        """Divergence and log-ratio of each response, (2, R * B)."""
        policy = self._modules[one.policy].response_logits(batch)
        reference = self._reference.response_logits(batch)
        pieces = [
            token_divergence(ours, theirs, targets, one.temperature)
            for (ours, targets), (theirs, _) in zip(policy, reference, strict=True)
        ]
        of_tokens = torch.cat(pieces, dim=1)  # (2, N)
        return torch.stack([sum_per_response(values, batch) for values in of_tokens])


def token_divergence(
    policy: Tensor, reference: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """Exact divergence and log-ratio of the targets, at each token, (2, n).

    Args:
        policy, reference: logits (n, V).
        targets: (n,).
        temperature: of the policy; at 0 all its probability is on the likeliest token.

    Raises:
        UserError: the vocabularies differ.
    """
    if policy.shape != reference.shape:
        raise UserError(
            f"a policy has logits for {policy.shape[-1]} tokens and the reference for "
            f"{reference.shape[-1]}: they cannot be compared"
        )
    theirs = reference.log_softmax(-1)
    targets = targets[:, None]
    if temperature == 0:
        likeliest = policy.argmax(-1, keepdim=True)
        found = [-theirs.gather(-1, likeliest)[:, 0], -theirs.gather(-1, targets)[:, 0]]
    else:
        ours = (policy / temperature).log_softmax(-1)
        gaps = ours - theirs
        # A token without probability adds nothing, even where its logits are -inf.
        terms = torch.where(ours.isneginf(), 0.0, ours.exp() * gaps)
        found = [terms.sum(-1), gaps.gather(-1, targets)[:, 0]]
    return torch.stack(found)


def describe_divergence(samples: pa.Table, one: SampleSet, num_prompts: int) -> dict[str, Any]:
    """Mean KL(policy || reference) in nats per response, with its standard error over prompts.

    And those of the mean log-ratio, for comparison.
    """
    kl, kl_error = _mean_with_error(by_prompt(samples[one.kl], num_prompts))
    logratio, logratio_error = _mean_with_error(by_prompt(samples[one.logratio], num_prompts))
    return {
        "kl": kl,
        "kl_standard_error": kl_error,
        "logratio": logratio,
        "logratio_standard_error": logratio_error,
    }


def _mean_with_error(values: Values) -> tuple[float, float | None]:
    """Of values (Q, K): samples of one prompt are alike, so prompts are the observations."""
    per_prompt = values.mean(axis=1)
    if len(per_prompt) < 2:
        return float(per_prompt.mean()), None
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / np.sqrt(len(per_prompt)))
