"""Why pairs could not be scored, and how many of them a run may have."""

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

from madpo_ray.errors import UserError

MAX_REASONS = 5  # in a message


class UnscorableRows(ValueError):  # noqa: N818 (about some rows of a table)
    """Rows of a table that a scorer cannot score, whatever the others are.

    Args:
        reasons: by the row's place in the table.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


def check_reasons(reasons: pa.ChunkedArray, allowed: float) -> Counter[str]:
    """How many pairs could not be scored, by kind of reason.

    Args:
        reasons: a pair's is null if it could be scored.
        allowed: data.max_reject_fraction.

    Raises:
        UserError: more could not be scored than are allowed.
    """
    failed = reasons.drop_null().to_pylist()
    counts = Counter(reason.partition(": ")[0] for reason in failed)
    if len(failed) > allowed * len(reasons):
        kinds = "; ".join(f"{count} x {kind}" for kind, count in counts.most_common(MAX_REASONS))
        raise UserError(
            f"{len(failed)} of {len(reasons)} pairs cannot be scored, more than "
            f"data.max_reject_fraction {allowed:g} allows: {kinds}. Such as: {failed[0]}"
        )
    return counts
