"""A table of samples as numbers: one entry per policy and temperature.

Legend: Q prompts, K samples of each. A table has Q * K rows: all prompts once, then again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray.evaluation.comparisons import (
    by_prompt,
    distinct_ngrams,
    length_controlled_win_rate,
    mean_with_interval,
    on_frontier,
    win_rate,
    wins_of,
)
from madpo_ray.evaluation.divergence import describe_divergence
from madpo_ray.evaluation.sample_sets import POLICY, REFERENCE, SampleSet

NGRAMS = (1, 2)


def describe_samples(
    samples: pa.Table, sample_sets: Sequence[SampleSet], *, num_prompts: int
) -> list[dict[str, Any]]:
    """Length, diversity, divergence and, if they were judged, rewards of each policy's samples.

    Win rates are against the reference's samples for the same prompts, at the same temperature.
    """
    entries = []
    for one in sample_sets:
        ids = samples[one.ids].to_pylist()
        entry: dict[str, Any] = {
            "policy": one.policy,
            "temperature": one.temperature,
            "samples": samples.num_rows,
            "tokens": float(np.mean([len(response) for response in ids])),
            **{f"distinct_{n}": _mean_distinct(ids, n, num_prompts) for n in NGRAMS},
            **describe_divergence(samples, one, num_prompts),
        }
        if one.reward in samples.column_names:
            entry["reward"] = mean_with_interval(by_prompt(samples[one.reward], num_prompts))
            if one.policy != REFERENCE:
                reference = SampleSet(REFERENCE, one.temperature)
                entry |= _compare(samples, one, reference, num_prompts)
        entries.append(entry)

    # Entries on the Pareto frontier of reward and divergence.
    judged = [entry for entry in entries if "reward" in entry]
    kls = [entry["kl"] for entry in judged]
    rewards = [entry["reward"]["mean"] for entry in judged]
    for entry, is_best in zip(judged, on_frontier(kls, rewards), strict=True):
        entry["on_frontier"] = is_best
    return entries


def _mean_distinct(ids: list[list[int]], n: int, num_prompts: int) -> float:
    """Over one sample of each prompt at a time: greedy samples of a prompt are all the same."""
    starts = range(0, len(ids), num_prompts)
    shares = [distinct_ngrams(ids[start : start + num_prompts], n) for start in starts]
    return float(np.mean(shares))


def compare_with_others(
    samples: pa.Table, sample_sets: Sequence[SampleSet], *, num_prompts: int
) -> list[dict[str, Any]]:
    """The policy against those of other runs, paired by prompt, at each temperature; if judged.

    `reward_difference` is the policy's mean reward less the other's.
    """
    found = []
    for other in sample_sets:
        if other.policy in (POLICY, REFERENCE) or other.reward not in samples.column_names:
            continue
        policy = SampleSet(POLICY, other.temperature)
        found.append(
            {
                "against": other.policy,
                "temperature": other.temperature,
                **_compare(samples, policy, other, num_prompts),
            }
        )
    return found


def _compare(
    samples: pa.Table, one: SampleSet, other: SampleSet, num_prompts: int
) -> dict[str, Any]:
    """One set of samples against another for the same prompts."""
    ours, theirs = (by_prompt(samples[s.reward], num_prompts) for s in (one, other))
    our_lengths, their_lengths = (
        by_prompt(pc.list_value_length(samples[s.ids]), num_prompts) for s in (one, other)
    )
    controlled = length_controlled_win_rate(wins_of(ours, theirs), our_lengths - their_lengths)
    return {
        "reward_difference": mean_with_interval(ours - theirs),
        "win_rate": win_rate(ours, theirs),
        "length_controlled_win_rate": controlled,
    }


def flat_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of some samples as a line of a table; intervals are two columns."""
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            found[name] = value["mean"]
            found[f"{name}_low"], found[f"{name}_high"] = value["interval"] or (None, None)
        else:
            found[name] = value
    return found
