"""The config: all sections, and the checks across them."""

from typing import Any

from pydantic import Field, model_validator

from madpo_ray.config.base import Section
from madpo_ray.config.evaluation import (
    ActorPool,
    EvaluateConfig,
    MarginsConfig,
    ScoringConfig,
)
from madpo_ray.config.inputs import ClusterConfig, DataConfig, ModelConfig, RunConfig
from madpo_ray.config.reward import RewardConfig
from madpo_ray.config.search import SEARCH_SPACES, Domain, TuneConfig
from madpo_ray.config.training import PolicyConfig, SFTConfig


class Config(Section):
    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    sft: SFTConfig | None = Field(
        None, description="the model itself is the initial policy and the reference"
    )
    reward: RewardConfig = RewardConfig()
    scoring: ScoringConfig = ScoringConfig()
    margins: MarginsConfig = MarginsConfig()
    train: PolicyConfig = PolicyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()

    @property
    def search_space(self) -> dict[str, Domain]:
        """What a search varies: tune.search_space, or the default for train.loss_type."""
        return self.tune.search_space or SEARCH_SPACES[self.train.loss_type]

    @property
    def actors(self) -> ActorPool:
        """The actors of a pass with models."""
        scoring = self.scoring
        cluster = self.cluster
        num_gpus = 0.0
        if cluster.use_gpu:
            num_gpus = scoring.gpus_per_actor or 1.0
        # As many as the workers, or as their GPUs suffice for.
        default_size = max(1, int(cluster.num_workers / max(1.0, num_gpus)))
        if scoring.max_actors is not None:
            default_size = min(default_size, scoring.max_actors)
        min_size = scoring.min_actors or default_size
        return ActorPool(
            min_size=min_size,
            max_size=scoring.max_actors or min_size,
            num_cpus=scoring.cpus_per_actor or cluster.cpus_per_worker,
            num_gpus=num_gpus,
        )

    @property
    def score_columns(self) -> tuple[str, ...]:
        """The kept columns with the true scores of chosen and rejected, or ()."""
        names = (self.evaluate.chosen_score_column, self.evaluate.rejected_score_column)
        return tuple(name for name in names if name is not None)

    @model_validator(mode="before")
    @classmethod
    def _choose_dtype(cls, raw: Any) -> Any:
        """GPUs are made for bfloat16: it is their default."""
        if not isinstance(raw, dict):
            return raw
        cluster, model = raw.get("cluster"), raw.get("model")
        if not isinstance(cluster, dict) or not isinstance(model, dict):
            return raw
        is_left_open = cluster.get("use_gpu") is True and "dtype" not in model
        return {**raw, "model": {**model, "dtype": "bfloat16"}} if is_left_open else raw

    @model_validator(mode="after")
    def _check_four_bits(self) -> "Config":
        if not self.model.load_in_4bit:
            return self
        trains_adapter = (
            self.train.use_peft and self.train.zero_stage < 3 and not self.train.merge_adapter
        )
        if not (self.cluster.use_gpu and trains_adapter and self.sft is None):
            raise ValueError(
                "model.load_in_4bit needs cluster.use_gpu, train.use_peft, a train.zero_stage "
                "below 3, and neither a section sft nor train.merge_adapter: 4-bit weights are "
                "neither trained nor merged into"
            )
        return self

    @model_validator(mode="after")
    def _check_attention_kernel(self) -> "Config":
        kernel = self.model.attn_implementation
        if kernel == "flash_attention_2" and not self.cluster.use_gpu:
            raise ValueError(
                f"model.attn_implementation: {kernel} trains on GPUs only: set cluster.use_gpu, "
                "or use sdpa"
            )
        if kernel == "flash_attention_2" and self.model.dtype == "float32":
            raise ValueError(
                "model.attn_implementation: flash_attention_2 computes in bfloat16 only: set "
                "model.dtype: bfloat16, or use sdpa"
            )
        return self

    @model_validator(mode="after")
    def _check_liger(self) -> "Config":
        if self.model.use_liger_kernel and not self.cluster.use_gpu:
            raise ValueError("model.use_liger_kernel needs cluster.use_gpu: it is for GPUs")
        return self

    @model_validator(mode="after")
    def _check_streamed_models(self) -> "Config":
        if self.scoring.one_model_at_a_time and self.margins.mode == "stream":
            raise ValueError(
                "scoring.one_model_at_a_time needs margins.mode: stored: a training that streams "
                "its margins reads a pair with all models at once"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> "Config":
        if not self.model.torch_compile:
            return self
        sections = {"sft": self.sft, "reward": self.reward, "train": self.train}
        for name, section in sections.items():
            if section is not None and section.zero_stage == 3:
                raise ValueError(
                    f"model.torch_compile does not work with {name}.zero_stage: 3, which gathers "
                    "weights inside layers: lower the stage, or remove model.torch_compile"
                )
            if section is not None and section.gradient_checkpointing:
                raise ValueError(
                    f"model.torch_compile does not work with {name}.gradient_checkpointing, where "
                    "PyTorch cannot compile a part of a layer: remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _check_shares_of_gpus(self) -> "Config":
        shares = {
            "cluster.gpus_per_worker": self.cluster.gpus_per_worker != 1,
            "scoring.gpus_per_actor": self.scoring.gpus_per_actor is not None,
        }
        for key, is_set in shares.items():
            if is_set and not self.cluster.use_gpu:
                raise ValueError(f"{key} needs cluster.use_gpu: true")
        return self

    @model_validator(mode="after")
    def _check_kept_columns(self) -> "Config":
        if len(self.score_columns) == 1:
            raise ValueError(
                "evaluate.chosen_score_column and evaluate.rejected_score_column go together: "
                "give both"
            )
        wanted = [("evaluate", column) for column in self.score_columns]
        if self.train.weight_column is not None:
            wanted.append(("train", self.train.weight_column))
        wanted += [("reward", column) for column in self.reward.source_columns]
        for section, column in wanted:
            if column not in self.data.kept_columns:
                raise ValueError(
                    f"{section} asks for column {column!r}: add it to data.keep_columns"
                )
        return self
