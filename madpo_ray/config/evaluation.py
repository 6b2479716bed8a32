"""Sections scoring, margins, evaluate and tune: what is measured once a model is trained."""

from pydantic import Field, field_validator

from madpo_ray.config.base import Section, operational
from madpo_ray.config.training import PolicyConfig, Range
from madpo_ray.errors import did_you_mean


class ScoringConfig(Section):
    """One pass over pairs with a reward model or a policy; stages margins and evaluate."""

    per_device_batch_size: int = operational(8, ge=1, description="pairs per forward")
    batch_size: int = operational(
        256, ge=1, description="pairs that an actor sorts by length and scores per call"
    )


class MarginsConfig(Section):
    with_rewards: bool | None = Field(
        None,
        description="score reward margins; null: if train.loss_type uses them. true with another "
        "loss_type logs margin/* metrics",
    )
    calibrate: bool = Field(
        True, description="divide rewards by the temperature fitted on validation pairs"
    )


class EvaluateConfig(Section):
    chosen_score_column: str | None = Field(
        None, description="kept column with the chosen response's true score"
    )
    rejected_score_column: str | None = Field(
        None, description="kept column with the rejected response's true score"
    )
    num_samples: int = Field(
        32, ge=2, description="sampled responses for the KL estimate, two per prompt"
    )
    num_shown: int = Field(5, ge=1, description="samples to print, before and after training")
    max_new_tokens: int = Field(64, ge=1, description="of a sample")
    generation_batch_size: int = Field(16, ge=1, description="prompts sampled at a time")


class TuneConfig(Section):
    num_samples: int = Field(8, ge=1, description="trials")
    max_concurrent_trials: int = Field(
        1, ge=1, description="trials at a time; each uses cluster.num_workers workers"
    )
    grace_period: int = Field(1, ge=1, description="evaluations before ASHA may stop a trial")
    search_space: dict[str, Range] | None = Field(
        None,
        description="keys of section train, and their ranges; null: a default for the loss_type",
    )

    @field_validator("search_space")
    @classmethod
    def _check_keys(cls, value: dict[str, Range] | None) -> dict[str, Range] | None:
        fields = PolicyConfig.model_fields.items()
        numbers = [name for name, field in fields if field.annotation is float]
        for key in value or {}:
            if key not in numbers:
                raise ValueError(
                    f"{key!r} is not a real number of section train{did_you_mean(key, numbers)}"
                )
        return value
