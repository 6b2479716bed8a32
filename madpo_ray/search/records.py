"""What a search notes on the disk while it runs, so that its next start can resume it."""

from pathlib import Path
from typing import Any

import ray.tune

from madpo_ray.atomic import write_json
from madpo_ray.search.outcomes import EVALUATION
from madpo_ray.search.space import Values, with_reciprocals
from madpo_ray.search.trials import Trials


class TrialRecords(ray.tune.Callback):  # type: ignore[misc]
    """Notes which trials there are, and which have ended.

    Args:
        drawn_file: gets what was drawn for each trial, in their order.
        known: what it holds; these trials come again, in this order.
    """

    def __init__(self, trials: Trials, drawn_file: Path, known: list[Values]) -> None:
        self._trials = trials
        self._drawn_file = drawn_file
        self._known = known

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trials)  # it may not have started

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        config = self._trials.config
        own = self._trials.of(with_reciprocals(config.search_space, trial.config))
        own.record_end(result.get(EVALUATION, 0), result.get("time_total_s"))
        if not config.run.keep_checkpoints:
            own.discard_checkpoints()

    def _record(self, trials: list[Any]) -> None:
        drawn = [dict(one.config) for one in trials]
        write_json(self._drawn_file, drawn + self._known[len(drawn) :])
