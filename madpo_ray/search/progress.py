"""How far a search is: a line for each trial that ends, and a table on a terminal."""

import logging
import sys
from pathlib import Path
from typing import Any

import ray.tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from madpo_ray.atomic import write_json
from madpo_ray.search.outcomes import EVALUATION, OBJECTIVES, TOTAL_STEPS, shown
from madpo_ray.search.space import Values, complete
from madpo_ray.search.trials import Trials

logger = logging.getLogger(__name__)

NUM_ROWS = 15  # of the table: the newest trials


class SearchProgress(ray.tune.Callback):  # type: ignore[misc]
    """Follows a search; notes which trials there are, and which have ended.

    Args:
        drawn_file: gets what was drawn for each trial, in their order.
        known: what it holds; these trials come again, in this order.
    """

    def __init__(self, trials: Trials, drawn_file: Path, known: list[Values]) -> None:
        self._trials = trials
        self._drawn_file = drawn_file
        self._known = known
        self._total = 0
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # Tune pickles its callbacks

    def setup(self, total_num_samples: int | None = None, **info: Any) -> None:
        self._total = total_num_samples or 0
        if sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), transient=True)
            self._live.start()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trials)

    def _record(self, trials: list[Any]) -> None:
        drawn = [dict(one.config) for one in trials]
        write_json(self._drawn_file, drawn + self._known[len(drawn) :])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        evaluation = (trial.last_result or {}).get(EVALUATION, 0)
        keep = self._trials.config.run.keep_checkpoints
        self._trials.of(self._values(trial)).record_end(evaluation, keep_checkpoints=keep)
        self._report(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trials)  # it may not have started
        self._report(trials, trial)

    def close(self) -> None:
        """Ends the table, however the search ended."""
        if self._live is not None:
            self._live.stop()

    def _values(self, trial: Any) -> Values:
        return complete(self._trials.config.search_space, trial.config)

    def _report(self, trials: list[Any], trial: Any) -> None:
        name, _ = OBJECTIVES[self._trials.config.tune.objective][0]
        result = trial.last_result or {}
        value = f"{name} {result[name]:.3f}" if name in result else "nothing measured"
        state = "failed" if trial.status == "ERROR" else "ended"
        logger.info(
            "trial %d of %d %s at step %d of %d: %s with %s",
            trials.index(trial) + 1,
            self._total,
            state,
            result.get("step", 0),
            result.get(TOTAL_STEPS, 0),
            value,
            shown(self._values(trial)),
        )

    def _table(self, trials: list[Any]) -> Table:
        """The newest trials, with how far they are."""
        table = Table(title=f"{len(trials)} of {self._total} trials")
        metric, _ = OBJECTIVES[self._trials.config.tune.objective][0]
        for heading in ("trial", "state", "evaluations", metric, "values"):
            table.add_column(heading)
        numbered = list(enumerate(trials, start=1))
        for number, trial in numbered[-NUM_ROWS:]:
            result = trial.last_result or {}
            value = f"{result[metric]:.3f}" if metric in result else "-"
            evaluation = str(result.get(EVALUATION, 0))
            state = trial.status.lower()
            table.add_row(str(number), state, evaluation, value, shown(self._values(trial)))
        return table
