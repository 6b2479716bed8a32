"""Entries of a small table of samples: two prompts, two samples of each."""

from pathlib import Path

import pyarrow as pa
import pytest

from madpo_ray.atomic import write_csv
from madpo_ray.evaluation.sample_sets import SampleSet
from madpo_ray.evaluation.samples import compare_with_others, describe_samples, flat_entry

POLICY, REFERENCE = SampleSet("policy", 0.7), SampleSet("reference", 0.7)
OTHER = SampleSet("other", 0.7)
TABLE = pa.table(
    {
        # Prompts 1, 2, 1, 2.
        POLICY.ids: [[1], [1, 2], [1], [1, 2, 3, 4]],
        REFERENCE.ids: [[5]] * 4,
        POLICY.reward: [1.0, 4.0, 3.0, 6.0],
        REFERENCE.reward: [1.0, 5.0, 1.0, 5.0],
        POLICY.kl: [1.0, 2.0, 3.0, 4.0],
        POLICY.logratio: [1.0, 2.0, 3.0, 4.0],
        REFERENCE.kl: [0.5] * 4,
        REFERENCE.logratio: [0.5] * 4,
        OTHER.ids: [[5]] * 4,
        OTHER.reward: [1.0, 5.0, 1.0, 5.0],
        OTHER.kl: [9.0] * 4,
        OTHER.logratio: [9.0] * 4,
    }
)
BOTH = [POLICY, REFERENCE]


def test_entries_by_hand() -> None:
    policy, reference = describe_samples(TABLE, BOTH, num_prompts=2)
    assert policy["tokens"] == 2.0
    # First samples: 1, 2 of three tokens; second ones: 1, 2, 3, 4 of five.
    assert policy["distinct_1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert policy["reward"]["mean"] == 3.5
    assert policy["reward"]["interval"][0] == 2.0  # the first prompt's mean
    assert policy["win_rate"]["mean"] == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert policy["kl"] == 2.5
    assert reference["reward"]["mean"] == 3.0
    assert "win_rate" not in reference
    assert (policy["on_frontier"], reference["on_frontier"]) == (True, True)
    assert reference["kl"] == 0.5


def test_samples_without_judge() -> None:
    table = TABLE.drop_columns([POLICY.reward, REFERENCE.reward])
    entries = describe_samples(table, BOTH, num_prompts=2)
    assert all("reward" not in entry and "on_frontier" not in entry for entry in entries)
    assert compare_with_others(table, BOTH, num_prompts=2) == []


def test_comparisons_are_paired_by_prompt() -> None:
    """Differences 0, -1, 2, 1: means of the prompts 1 and 0."""
    (found,) = compare_with_others(TABLE, [*BOTH, OTHER], num_prompts=2)
    assert (found["against"], found["temperature"]) == ("other", 0.7)
    assert found["reward_difference"]["mean"] == 0.5
    assert found["reward_difference"]["interval"] == (0.0, 1.0)


def test_csv_has_intervals_as_columns(tmp_path: Path) -> None:
    entries = describe_samples(TABLE, BOTH, num_prompts=2)
    write_csv(tmp_path / "samples.csv", list(map(flat_entry, entries)))
    header, policy, reference = (tmp_path / "samples.csv").read_text().splitlines()
    assert header.startswith("policy,temperature,samples,tokens,")
    assert "reward,reward_low,reward_high" in header
    assert policy.startswith("policy,0.7,4,2.0,")
    assert reference.startswith("reference,0.7,4,1.0,")
