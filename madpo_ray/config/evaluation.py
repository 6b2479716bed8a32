"""Sections scoring, margins and evaluate: what is measured once a model is trained."""

from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from madpo_ray.config.base import Section, Strings, operational
from madpo_ray.config.reward import kind_of


class ActorPool(NamedTuple):
    """How many actors a pass of Ray Data has, and the resources of each."""

    min_size: int
    max_size: int
    num_cpus: float
    num_gpus: float

    @property
    def num_threads(self) -> int:
        """CPU threads of one actor."""
        return max(1, int(self.num_cpus))


class ForwardOptions(NamedTuple):
    """How much a model in an actor reads at a time, and where it is."""

    micro_batch_size: int  # pairs per forward, unless their tokens are bounded
    max_tokens: int | None = None  # per forward
    over_gpus: bool = False  # its layers are spread over all GPUs of the actor


class ScoringConfig(Section):
    """One pass over pairs with a reward model or a policy; stages margins and evaluate."""

    per_device_batch_size: int = operational(8, ge=1, description="pairs per forward")
    max_tokens_per_device: int | None = operational(
        None,
        ge=1,
        description="tokens per forward instead of a number of pairs",
    )
    batch_size: int = operational(
        256, ge=1, description="pairs that an actor sorts by length and scores per call, at most"
    )
    min_actors: int | None = operational(
        None,
        ge=1,
        description="actors to start with; null: cluster.num_workers, or as many as "
        "their GPUs suffice for",
    )
    max_actors: int | None = operational(
        None, ge=1, description="actors that Ray Data may grow to; null: as many as it starts with"
    )
    cpus_per_actor: float | None = operational(
        None, gt=0, description="logical CPUs per actor; its threads. null: cluster.cpus_per_worker"
    )
    gpus_per_actor: float | None = operational(
        None,
        gt=0,
        description="GPUs per actor: a share of one, or several over which the layers of its "
        "models are spread; null: 1 if cluster.use_gpu is set",
    )

    one_model_at_a_time: bool = operational(
        False,
        description="stage margins scores with the reward models and with the reference in two "
        "passes: for models that do not fit a GPU together",
    )

    @property
    def over_gpus(self) -> bool:
        """Whether the layers of a model are on several GPUs of an actor."""
        return (self.gpus_per_actor or 1) > 1

    @property
    def forward(self) -> ForwardOptions:
        """Of scorers with a model."""
        return ForwardOptions(
            self.per_device_batch_size, self.max_tokens_per_device, self.over_gpus
        )

    @model_validator(mode="after")
    def _check_actors(self) -> "ScoringConfig":
        lowest, highest = self.min_actors or 1, self.max_actors
        if highest is not None and lowest > highest:
            raise ValueError("min_actors is more than max_actors")
        if self.over_gpus and self.gpus_per_actor != int(self.gpus_per_actor or 1):
            raise ValueError("gpus_per_actor is a share of one GPU, or a whole number of them")
        return self


class MarginsConfig(Section):
    mode: Literal["stored", "stream"] = operational(
        "stored",
        description="stored: every pair is scored before training; stream: while the first epoch "
        "trains on it",
    )
    with_rewards: bool | None = Field(
        None,
        description="score reward margins; null: if train.loss_type uses them. true with another "
        "loss_type logs margin/* metrics",
    )
    calibration: Literal["temperature", "isotonic", "none"] = Field(
        "temperature",
        description="fitted on validation pairs. temperature: rewards are divided by it; isotonic: "
        "an increasing function of the margin; none: margins as they are",
    )
    rows_per_file: int | None = operational(
        None, ge=1, description="of the artifact's Parquet files; null: as stage pairs wrote them"
    )


class EvaluateConfig(Section):
    chosen_score_column: str | None = Field(
        None, description="kept column with the chosen response's true score"
    )
    rejected_score_column: str | None = Field(
        None, description="kept column with the rejected response's true score"
    )
    num_samples: int = Field(
        32, ge=2, description="sampled responses of each policy and temperature, two per prompt"
    )
    temperatures: tuple[float, ...] = Field(
        (1.0,), min_length=1, strict=False, description="of decoding; 0 is greedy"
    )
    judge: str | None = Field(
        None,
        description="what gives samples rewards: the folder or hub name of a classifier with one "
        "label, or module:function. null: they get none",
    )
    judge_revision: str = Field("main", description="of a judge on the hub")
    compare_with: Strings = Field(
        (), description="folders of other finished runs, whose policies are sampled, too"
    )
    num_shown: int = Field(5, ge=1, description="samples to print, before and after training")
    max_new_tokens: int = Field(64, ge=1, description="of a sample")
    generation_batch_size: int = Field(16, ge=1, description="prompts sampled at a time")

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(one != 0 and not 0.01 <= one <= 100 for one in value):
            raise ValueError("a temperature is 0 or between 0.01 and 100")
        if len({f"{one:g}" for one in value}) < len(value):
            raise ValueError("temperatures must differ, in their first six digits")
        return value

    @field_validator("judge")
    @classmethod
    def _check_judge(cls, value: str | None) -> str | None:
        if value is not None and kind_of(value) not in ("classifier", "function"):
            raise ValueError(f"{value} is neither a classifier nor module:function")
        return value
