"""Search spaces for Optuna, and a sampler whose draws follow from seed, trial and results only.

Optuna's own samplers continue one stream of random numbers, which a search that resumes with its
earlier trials would begin again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from madpo_ray.config import Domain
from madpo_ray.config.search import Choice, Grid, Integers, LogUniform, Uniform

# Between the seeds of two searches, more than a search has trials.
STRIDE = 1_000_003


class NumberedSampler(BaseSampler):
    """TPE (Bergstra et al. 2011), with a stream of random numbers for each trial.

    The first third of the trials, at least three and at most ten, are independent draws.

    Args:
        num_trials: of the search.
    """

    def __init__(self, seed: int, num_trials: int) -> None:
        self._seed = seed
        self._number = -1
        self._num_random = min(10, max(3, num_trials // 3))
        self._sampler = self._make(seed)

    def _make(self, seed: int) -> TPESampler:
        return TPESampler(seed=seed, n_startup_trials=self._num_random)

    def _of(self, trial: FrozenTrial) -> TPESampler:
        if trial.number != self._number:
            self._number = trial.number
            self._sampler = self._make((self._seed * STRIDE + trial.number) % 2**32)
        return self._sampler

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def distributions_of(
    space: Mapping[str, Domain],
) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each key that is drawn."""
    return {key: found for key, one in space.items() if (found := _distribution(one)) is not None}


def _distribution(domain: Domain) -> BaseDistribution | None:
    match domain:
        case Uniform(min=low, max=high):
            return FloatDistribution(low, high)
        case LogUniform(min=low, max=high):
            return FloatDistribution(low, high, log=True)
        case Integers(min=low, max=high, log=log):
            return IntDistribution(low, high, log=log)
        case Choice(values=values) | Grid(values=values):
            return CategoricalDistribution(values)
    return None
