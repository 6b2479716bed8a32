"""Reports how far a scoring pass is: pairs and tokens per second, and the time left."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)

REPORT_S = 30.0


class _Count(NamedTuple):
    """How much was scored at a time."""

    seconds: float
    pairs: int
    tokens: int


class ScoringProgress:
    """Counts what a pass has scored.

    Rates are those since the first scores came: the models are loaded by then.

    Args:
        num_pairs: of the complete pass.
        clock: gives seconds.
    """

    def __init__(self, num_pairs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_pairs = num_pairs
        self._clock = clock
        self._first: _Count | None = None
        self._now = _Count(clock(), 0, 0)
        self._reported = self._now.seconds

    def add(self, pairs: int, tokens: int) -> None:
        """Counts scored pairs. Logs a line every half minute, and at the end."""
        self._now = _Count(self._clock(), self._now.pairs + pairs, self._now.tokens + tokens)
        if self._first is None:
            self._first = self._now
        is_complete = self._now.pairs == self._num_pairs
        if is_complete or self._now.seconds - self._reported >= REPORT_S:
            self._reported = self._now.seconds
            rates = self._describe_rates(self._first)
            logger.info("scored %d of %d pairs%s", self._now.pairs, self._num_pairs, rates)

    def _describe_rates(self, first: _Count) -> str:
        seconds = self._now.seconds - first.seconds
        pairs = self._now.pairs - first.pairs
        if seconds <= 0 or pairs == 0:
            return ""
        tokens = self._now.tokens - first.tokens
        rates = f": {pairs / seconds:,.1f} pairs/s, {tokens / seconds:,.0f} tokens/s"
        left = self._num_pairs - self._now.pairs
        return f"{rates}, {_duration(left * seconds / pairs)} left" if left else rates


def _duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
