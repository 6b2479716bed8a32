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

    def allows(self, cause: str, step: int, *, is_error_of_code: bool) -> bool:
        """Whether to start again after a failure, which is logged with its cause.

        Args:
            cause: in one line.
            step: of the newest checkpoint.
            is_error_of_code: the code raised it. The same one again without progress in between
                would come again and again. A process or node that was lost may come back.
        """
        is_same = cause == self.last_cause and step == self.last_step
        if step > self.last_step:
            self.failures = 0
        self.failures += 1
        self.last_step = step
        self.last_cause = cause

        if is_same and is_error_of_code:
            logger.error("the same error came again after step %d; not trying again", step)
            return False
        if 0 <= self.limit < self.failures:
            logger.error("cluster.max_failures: %d restarts brought no progress", self.limit)
            return False
        logger.warning(
            "starting the workers again from %s, after: %s",
            f"step {step}" if step else "the start",
            cause,
        )
        return True
