"""How far a search is: a line for each trial that ends, and a table on a terminal."""

import logging
import sys
from typing import Any

import ray.tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from madpo_ray.config import Config
from madpo_ray.search.outcomes import EVALUATION, OBJECTIVES, TOTAL_STEPS, format_values
from madpo_ray.search.space import with_reciprocals

logger = logging.getLogger(__name__)

NUM_ROWS = 15  # of the table: the newest trials


class SearchProgress(ray.tune.Callback):  # type: ignore[misc]
    """Shows how far a search is."""

    def __init__(self, config: Config) -> None:
        self._space = config.search_space
        self._metric, _ = OBJECTIVES[config.tune.objective][0]
        self._total = 0
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # Tune pickles its callbacks

    def setup(self, total_num_samples: int | None = None, **info: Any) -> None:
        self._total = total_num_samples or 0
        if sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), transient=True)
            self._live.start()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._report(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._report(trials, trial)

    def close(self) -> None:
        """Ends the table, however the search ended."""
        if self._live is not None:
            self._live.stop()

    def _shown(self, trial: Any) -> str:
        return format_values(with_reciprocals(self._space, trial.config))

    def _report(self, trials: list[Any], trial: Any) -> None:
        name = self._metric
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
            self._shown(trial),
        )

    def _table(self, trials: list[Any]) -> Table:
        """The newest trials, with how far they are."""
        table = Table(title=f"{len(trials)} of {self._total} trials")
        metric = self._metric
        for heading in ("trial", "state", "evaluations", metric, "values"):
            table.add_column(heading)
        numbered = list(enumerate(trials, start=1))
        for number, trial in numbered[-NUM_ROWS:]:
            result = trial.last_result or {}
            value = f"{result[metric]:.3f}" if metric in result else "-"
            evaluation = str(result.get(EVALUATION, 0))
            state = trial.status.lower()
            table.add_row(str(number), state, evaluation, value, self._shown(trial))
        return table
