"""Pairs that cannot be scored: counted by kind, and refused if they are too many."""

import pyarrow as pa
import pytest

from madpo_ray.errors import UserError
from madpo_ray.scoring.reasons import check_reasons

REASONS = pa.chunked_array([["rewards are nan", None, "raised E: a", "raised E: b"]], pa.string())


def test_counts_kinds() -> None:
    assert check_reasons(REASONS, 0.75) == {"raised E": 2, "rewards are nan": 1}
    assert check_reasons(REASONS.slice(0, 0), 0.0) == {}


def test_too_many_are_refused() -> None:
    expected = (
        "3 of 4 pairs cannot be scored, more than data.max_reject_fraction 0.74 allows: "
        "2 x raised E; 1 x rewards are nan. Such as: rewards are nan"
    )
    with pytest.raises(UserError) as caught:
        check_reasons(REASONS, 0.74)
    assert str(caught.value) == expected
