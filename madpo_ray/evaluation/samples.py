"""A table of samples as numbers: one entry per policy and temperature.

Legend: Q prompts, K samples of each. A table has Q * K rows: all prompts once, then again.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from madpo_ray.evaluation.comparisons import (
    Values,
    distinct,
    length_controlled_win_rate,
    mean_with_interval,
    on_frontier,
    win_rate,
    wins_of,
)
from madpo_ray.evaluation.divergence import Sampled, divergence

NGRAMS = (1, 2)


def describe_samples(
    samples: pa.Table, sampled: Sequence[Sampled], *, reference: str, num_prompts: int
) -> list[dict[str, Any]]:
    """Length, variety, divergence and, if they were judged, rewards of each policy's samples.

    Win rates are against the reference's samples for the same prompts, at the same temperature.
    """
    entries = []
    for one in sampled:
        ids = samples[one.ids].to_pylist()
        entry: dict[str, Any] = {
            "policy": one.policy,
            "temperature": one.temperature,
            "samples": samples.num_rows,
            "tokens": float(np.mean([len(response) for response in ids])),
            **{f"distinct_{n}": distinct(ids, n) for n in NGRAMS},
        }
        if one.kl in samples.column_names:
            entry |= divergence(samples, one)
        if one.reward in samples.column_names:
            rewards = _by_prompt(samples[one.reward], num_prompts)
            entry["reward"] = mean_with_interval(rewards)
            if one.policy != reference:
                other = Sampled(reference, one.temperature)
                entry |= _against(samples, one, other, num_prompts)
        entries.append(entry)

    # What no other entry is better than, in reward and divergence. The reference costs nothing.
    judged = [entry for entry in entries if "reward" in entry]
    costs = [entry.get("kl", 0.0) for entry in judged]
    gains = [entry["reward"]["mean"] for entry in judged]
    for entry, is_best in zip(judged, on_frontier(costs, gains), strict=True):
        entry["on_frontier"] = is_best
    return entries


def compare_policies(
    samples: pa.Table, sampled: Sequence[Sampled], *, policy: str, num_prompts: int
) -> list[dict[str, Any]]:
    """The policy against each other one, paired by prompt, at each temperature; if judged.

    `reward_difference` is the policy's mean reward less the other's.
    """
    found = []
    for other in sampled:
        one = Sampled(policy, other.temperature)
        if other.policy == policy or other.reward not in samples.column_names:
            continue
        ours, theirs = (_by_prompt(samples[s.reward], num_prompts) for s in (one, other))
        found.append(
            {
                "policy": policy,
                "against": other.policy,
                "temperature": other.temperature,
                "reward_difference": mean_with_interval(ours - theirs),
                **_against(samples, one, other, num_prompts),
            }
        )
    return found


def _against(samples: pa.Table, one: Sampled, other: Sampled, num_prompts: int) -> dict[str, Any]:
    ours, theirs = (_by_prompt(samples[s.reward], num_prompts) for s in (one, other))
    our_lengths, their_lengths = (
        _by_prompt(pa.array([len(ids) for ids in samples[s.ids].to_pylist()]), num_prompts)
        for s in (one, other)
    )
    controlled = length_controlled_win_rate(wins_of(ours, theirs), our_lengths - their_lengths)
    return {
        "win_rate": win_rate(ours, theirs),
        "length_controlled_win_rate": controlled,
    }


def _by_prompt(column: pa.ChunkedArray, num_prompts: int) -> Values:
    """Values of samples as (Q, K)."""
    values: Values = column.to_numpy().astype(np.float64).reshape(-1, num_prompts).T
    return values


def write_csv(file: Path, entries: list[dict[str, Any]]) -> None:
    """One line per policy and temperature; intervals as two columns."""
    flat = [_flat(entry) for entry in entries]
    names = list(dict.fromkeys(name for entry in flat for name in entry))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(flat)


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            found[name] = value["mean"]
            found[f"{name}_low"], found[f"{name}_high"] = value["interval"]
        else:
            found[name] = value
    return found
