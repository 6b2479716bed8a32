"""Section tune: which keys a search varies, over which values, and how."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from madpo_ray.config.base import Section, operational
from madpo_ray.config.training import LossType, PolicyConfig
from madpo_ray.errors import did_you_mean

SEED = "run.seed"
# Keys of section train that a search decides itself, or that change no result.
NOT_SEARCHED = PolicyConfig().operational_keys() | {
    "eval_steps",
    "metric_for_best_model",
    "early_stopping_patience",
}
SEARCHED_KEYS = (
    *(f"train.{name}" for name in PolicyConfig.model_fields if name not in NOT_SEARCHED),
    SEED,
)


class _Bounded(Section):
    min: float
    max: float

    @model_validator(mode="after")
    def _check_bounds(self) -> "_Bounded":
        if not self.min < self.max:
            raise ValueError("a range needs min < max")
        return self


class _Listed(Section):
    values: tuple[Any, ...] = Field(min_length=1, strict=False)

    @field_validator("values")
    @classmethod
    def _check_values(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not all(isinstance(one, bool | int | float | str | None) for one in value):
            raise ValueError("values are texts, numbers, true, false or null")
        if len({repr(one) for one in value}) < len(value):
            raise ValueError("a value is given twice")
        return value


class Uniform(_Bounded):
    """A real number between two bounds."""

    type: Literal["uniform"]


class LogUniform(_Bounded):
    """A real number whose logarithm is uniform."""

    type: Literal["loguniform"]
    min: float = Field(gt=0)


class Integers(_Bounded):
    """A whole number between two bounds, both included."""

    type: Literal["int"]
    min: int
    max: int
    log: bool = False

    @model_validator(mode="after")
    def _check_log(self) -> "Integers":
        if self.log and self.min < 1:
            raise ValueError("a range with log: true needs min of at least 1")
        return self


class Choice(_Listed):
    """One of some values."""

    type: Literal["choice"]


class Grid(_Listed):
    """Each of some values, with each value of other grids."""

    type: Literal["grid"]


class Reciprocal(Section):
    """1 / the value that another key got."""

    type: Literal["reciprocal"]
    of: str


Domain = Annotated[
    Uniform | LogUniform | Integers | Choice | Grid | Reciprocal, Field(discriminator="type")
]

_BETA: dict[str, Domain] = {"train.beta": LogUniform(type="loguniform", min=0.01, max=0.5)}

# What `madpo-ray tune` searches by default: the first keys to search for each loss.
SEARCH_SPACES: dict[LossType, dict[str, Domain]] = {
    "sigmoid": _BETA,
    "ipo": _BETA,
    "ipo_sum": _BETA,
    "beta_dpo": {**_BETA, "train.beta_dpo_a": Uniform(type="uniform", min=0.1, max=1.0)},
    "madpo": {
        **_BETA,
        "train.c_min": Uniform(type="uniform", min=0.1, max=0.9),
        "train.c_max": Uniform(type="uniform", min=1.1, max=6.0),
    },
}


class TuneConfig(Section):
    searcher: Literal["optuna", "random"] = Field(
        "optuna", description="optuna: TPE; random: independent draws, and grids"
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha stops trials that fall behind; none trains each to its end"
    )
    num_samples: int = Field(8, ge=1, description="trials; with grids, for each of their points")
    evaluations: int = Field(
        4,
        ge=1,
        description="evaluations per trial at most, at equal intervals; ASHA may stop it there",
    )
    grace_period: int = Field(1, ge=1, description="evaluations before ASHA may stop a trial")
    reduction_factor: float = Field(
        2.0, gt=1, description="ASHA keeps the best 1 / reduction_factor of the trials at each rung"
    )
    max_concurrent_trials: int | None = operational(
        None,
        ge=1,
        description="trials at a time, each with cluster.num_workers workers. null: as many as "
        "fit; 1 with cluster.autoscaling, and with an objective of rewards",
    )
    objective: Literal["accuracy", "reward", "reward_and_kl"] = Field(
        "accuracy",
        description="on validation pairs. accuracy: eval_rewards/accuracies, ties one half; "
        "reward: evaluate.judge's mean reward of samples; reward_and_kl: that, and little "
        "divergence",
    )
    temperature: float = Field(
        1.0, ge=0, description="of the samples that the objectives with rewards judge; 0 is greedy"
    )
    search_space: dict[str, Domain] | None = Field(
        None, description="keys and their ranges; null: a default for the loss_type"
    )

    @field_validator("scheduler", mode="before")
    @classmethod
    def _explain_pbt(cls, value: Any) -> Any:
        if value in ("pbt", "pb2"):
            raise ValueError(
                f"{value} copies checkpoints between trials, which Ray Tune silently does not do "
                "for trainings by Ray Train: use asha"
            )
        return value

    @field_validator("search_space")
    @classmethod
    def _check_keys(cls, value: dict[str, Domain] | None) -> dict[str, Domain] | None:
        for key, domain in (value or {}).items():
            if key not in SEARCHED_KEYS:
                raise ValueError(
                    f"{key!r} cannot be searched{did_you_mean(key, SEARCHED_KEYS)}; {SEED} can, "
                    "and those keys of section train that decide results and that the search does "
                    "not set itself"
                )
            if isinstance(domain, Reciprocal):
                other = (value or {}).get(domain.of)
                if not isinstance(other, Uniform | LogUniform | Integers) or other.min <= 0:
                    raise ValueError(
                        f"{key} is the reciprocal of {domain.of}, which is not a range above 0 in "
                        "tune.search_space"
                    )
        return value

    @model_validator(mode="after")
    def _check_search(self) -> "TuneConfig":
        space = (self.search_space or {}).values()
        has_grid = any(isinstance(domain, Grid) for domain in space)
        if has_grid and self.searcher != "random":
            raise ValueError("a grid needs tune.searcher: random; optuna takes type choice")
        is_fixed = all(isinstance(domain, Grid | Reciprocal) for domain in space)
        if has_grid and is_fixed and self.num_samples > 1:
            raise ValueError(
                f"tune.num_samples: {self.num_samples} would repeat the same points: set it to 1 "
                f"(a grid of {SEED} repeats points with other seeds)"
            )
        if self.search_space and all(isinstance(domain, Reciprocal) for domain in space):
            raise ValueError("tune.search_space varies nothing")
        if self.grace_period > self.evaluations:
            raise ValueError(
                f"tune.grace_period: {self.grace_period} is more than tune.evaluations: "
                f"{self.evaluations}, so that no trial could be stopped"
            )
        if self.objective != "accuracy" and self.scheduler == "asha":
            raise ValueError(
                f"tune.objective: {self.objective} is known at the end of a trial only: set "
                "tune.scheduler: none"
            )
        return self
