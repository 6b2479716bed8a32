"""Whether a failed training starts again. Knows no Ray."""

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Restarts:
    """Counts failures since the training last got further.

    Attributes:
        limit: failures without progress after which a training ends; -1: no limit.
    """

    limit: int
    failures: int = 0
    last_step: int = -1
    last_cause: str = ""

    def record_failure(self, cause: str, step: int, *, is_deterministic: bool) -> bool:
        """Counts and logs a failure. Returns whether to start the workers again.

        Args:
            cause: in one line.
            step: of the newest checkpoint.
            is_deterministic: code raised it, so that it is likely to repeat. A process or node that
                was lost may come back.
        """
        is_same = cause == self.last_cause and step == self.last_step
        if step > self.last_step:
            self.failures = 0
        self.failures += 1
        self.last_step = step
        self.last_cause = cause

        if is_same and is_deterministic:
            logger.error(
                "the same error occurred twice at step %d; not restarting: %s", step, cause
            )
            return False
        if 0 <= self.limit < self.failures:
            logger.error("no progress after %d restarts (cluster.max_failures)", self.limit)
            return False
        logger.warning(
            "starting the workers again from %s, after: %s",
            f"step {step}" if step else "the start",
            cause,
        )
        return True
