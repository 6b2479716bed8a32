"""Section reward: where rewards come from, and the training of a reward model."""

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from madpo_ray.config.base import Strings
from madpo_ray.config.training import TrainingConfig

SourceKind = Literal["trained", "columns", "function", "classifier"]


def kind_of(source: str) -> SourceKind:
    """What a source of rewards is."""
    if source == "trained":
        return "trained"
    if source == "columns":
        return "columns"
    return "function" if re.fullmatch(r"[\w.]+:\w+", source) else "classifier"


class RewardConfig(TrainingConfig):
    metrics: ClassVar[frozenset[str]] = frozenset(
        {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    )

    source: str = Field(
        "trained",
        description="where rewards come from. trained: a model trained here; columns: the data; "
        "module:function: Python; else the folder or hub name of a classifier with one label",
    )
    source_revision: str = Field("main", description="of a source on the hub")
    ensemble: Strings = Field(
        (),
        description="further classifiers and functions on the scale of source: rewards are the "
        "mean of all, and column margin_std is the standard deviation of their margins",
    )
    source_columns: Strings = Field(
        (),
        max_length=2,
        description="for source columns: kept columns with chosen and rejected reward, or with the "
        "margin",
    )
    folds: int = Field(
        1,
        ge=1,
        le=20,
        description="reward models to train, each without the pairs that it scores "
        "(cross-fitting); 1: one model that has seen the training pairs",
    )
    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="weight of (chosen + rejected reward)^2, as in TRL"
    )

    @property
    def source_kind(self) -> SourceKind:
        """What `source` is."""
        return kind_of(self.source)

    @model_validator(mode="after")
    def _check_ensemble(self) -> "RewardConfig":
        for member in self.ensemble:
            if kind_of(member) not in ("classifier", "function"):
                raise ValueError(f"ensemble: {member} is neither a classifier nor a function")
        if self.ensemble and self.source == "columns":
            raise ValueError("ensemble: its members score pairs, which source: columns does not")
        if len({self.source, *self.ensemble}) <= len(self.ensemble):
            raise ValueError("ensemble: a member is listed twice")
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> "RewardConfig":
        if self.folds > 1 and self.source != "trained":
            raise ValueError("folds are of reward models trained here: they need source: trained")
        return self

    @model_validator(mode="after")
    def _check_source_columns(self) -> "RewardConfig":
        if (self.source == "columns") != bool(self.source_columns):
            raise ValueError(
                "source: columns and source_columns go together: name the columns with chosen and "
                "rejected reward, or the one with the margin"
            )
        return self
