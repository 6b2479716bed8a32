"""Sections sft and train, what they share with reward, and the settings of each loss."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from madpo_ray.config.base import Section, Strings, operational
from madpo_ray.errors import did_you_mean


class TrainingConfig(Section):
    """What the loop needs, whatever it trains."""

    # Names that an evaluation measures, without the prefix eval_.
    metrics: ClassVar[frozenset[str]] = frozenset({"loss"})

    learning_rate: float = Field(1e-5, gt=0, description="peak of the schedule")
    global_batch_size: int = Field(
        32, ge=1, description="pairs per optimizer step, over all workers"
    )
    per_device_train_batch_size: int = Field(
        8, ge=1, description="pairs per forward; gradient accumulation follows from it"
    )
    per_device_eval_batch_size: int = operational(
        8, ge=1, description="pairs per forward in evaluation"
    )
    max_tokens_per_device: int | None = Field(
        None, ge=1, description="tokens per forward instead of a number of pairs"
    )
    num_train_epochs: int = Field(1, ge=1, description="passes over the training pairs")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: num_train_epochs decides")
    warmup_steps: float = Field(
        0.03, ge=0, description="optimizer steps; below 1 a share of all steps"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup", "constant"] = Field(
        "cosine", description="of the learning rate, after the warm-up"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, decoupled")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the square")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the denominator")

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="what DeepSpeed shards: optimizer (1), gradients (2), parameters (3)"
    )
    stage3_param_persistence_threshold: int = Field(
        100_000, ge=0, description="elements; smaller parameters are not sharded under ZeRO-3"
    )
    reduce_bucket_size: int = Field(
        500_000_000, ge=1, description="elements of gradients reduced at a time, under ZeRO 1 to 3"
    )
    stage3_max_live_parameters: int = Field(
        1_000_000_000, ge=1, description="elements that a rank keeps gathered under ZeRO-3"
    )
    overlap_comm: bool | None = Field(
        None,
        description="reduce gradients while the backward pass computes; takes a second bucket. "
        "null: under ZeRO-3 only, as DeepSpeed does",
    )
    offload_optimizer: bool = Field(
        False, description="optimizer states in CPU memory; needs zero_stage 2 or 3"
    )
    offload_param: bool = Field(False, description="parameters in CPU memory; needs zero_stage 3")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, to save memory"
    )

    disable_dropout: bool = Field(True, description="set every dropout to 0, LoRA's included")
    use_peft: bool = Field(False, description="train LoRA adapters instead of all weights")
    lora_r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: int = Field(32, ge=1, description="scale of the adapters, over lora_r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="ignored if disable_dropout is true")
    lora_target_modules: Strings = Field(("all-linear",), description="module names, or all-linear")
    lora_layers_to_transform: tuple[int, ...] = Field(
        (), strict=False, description="layers with LoRA; empty: all"
    )

    logging_steps: int = operational(10, ge=1, description="optimizer steps between logs")
    eval_steps: int | None = operational(
        None, ge=1, description="optimizer steps between evaluations; null: only at the end"
    )
    save_steps: int | None = operational(
        500, ge=1, description="optimizer steps between checkpoints; null: only at the end"
    )
    save_total_limit: int = operational(
        2, ge=1, description="checkpoints to keep; the newest and the best are never deleted"
    )
    metric_for_best_model: str | None = Field(
        None,
        description="such as eval_loss: every evaluation saves, and the best one's weights are "
        "the result",
    )
    greater_is_better: bool | None = Field(
        None, description="null: true unless the metric's name ends with loss"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="evaluations without a better metric after which training ends"
    )
    skip_nonfinite: int = operational(
        0,
        ge=0,
        description="how many steps with a non-finite loss or gradient to skip before the run "
        "fails",
    )

    def operational_keys(self) -> set[str]:
        keys = super().operational_keys()
        if self.metric_for_best_model is not None:
            keys.remove("eval_steps")  # evaluations decide which weights are the result
        return keys

    @property
    def best_metric(self) -> tuple[str, bool]:
        """Logged name of metric_for_best_model, and whether a greater value is better."""
        assert self.metric_for_best_model is not None
        name = self.metric_for_best_model
        greater = self.greater_is_better
        if greater is None:
            greater = not name.endswith("loss")
        return name if name.startswith("eval_") else f"eval_{name}", greater

    @field_validator("max_steps")
    @classmethod
    def _check_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("should be 1 or more, or -1 for num_train_epochs to decide")
        return value

    @field_validator("lora_target_modules")
    @classmethod
    def _check_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "all-linear" in value and len(value) > 1:
            raise ValueError("all-linear stands for all modules: give it alone")
        return value

    @model_validator(mode="after")
    def _check_offloading(self) -> "TrainingConfig":
        if self.offload_optimizer and self.zero_stage < 2:
            raise ValueError("offload_optimizer needs zero_stage 2 or 3")
        if self.offload_param and self.zero_stage < 3:
            raise ValueError("offload_param needs zero_stage 3")
        return self

    @model_validator(mode="after")
    def _check_best_metric(self) -> "TrainingConfig":
        if self.metric_for_best_model is not None:
            name = self.best_metric[0].removeprefix("eval_")
            if name not in self.metrics:
                raise ValueError(
                    f"metric_for_best_model: no {name!r} is measured"
                    f"{did_you_mean(name, self.metrics)}"
                )
        return self

    @model_validator(mode="after")
    def _check_patience(self) -> "TrainingConfig":
        needs = self.metric_for_best_model is None or self.eval_steps is None
        if self.early_stopping_patience is not None and needs:
            raise ValueError(
                "early_stopping_patience needs metric_for_best_model, such as eval_loss, and "
                "eval_steps"
            )
        return self

    @model_validator(mode="after")
    def _check_lora_layers(self) -> "TrainingConfig":
        if self.lora_layers_to_transform and self.lora_target_modules == ("all-linear",):
            raise ValueError(
                "lora_layers_to_transform needs lora_target_modules by name, such as "
                "[q_proj, v_proj]"
            )
        return self


class SFTConfig(TrainingConfig):
    metrics: ClassVar[frozenset[str]] = frozenset({"loss", "entropy"})


LossType = Literal["sigmoid", "ipo", "ipo_sum", "beta_dpo", "madpo"]


class PolicyConfig(TrainingConfig):
    metrics: ClassVar[frozenset[str]] = frozenset(
        {
            "loss",
            "entropy",
            "logps/chosen",
            "logps/rejected",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
        }
    )

    loss_type: LossType = Field(
        "madpo", description="sigmoid is DPO; only madpo needs a reward model"
    )
    beta: float = Field(0.1, gt=0, description="base temperature")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="cDPO, for loss_type sigmoid (TRL 1.16 ignores it there)"
    )
    c_min: float = Field(0.25, description="madpo: lower bound of the amplifier c, in (0, 1)")
    c_max: float = Field(4.0, description="madpo: upper bound of the amplifier c, above 1")
    lmbda: float = Field(1.0, gt=0, description="madpo: steepness of c around tau")
    tau: float = Field(
        7.0,
        description="madpo: margin at which the weight turns from amplifying to dampening, in "
        "reward units",
    )
    beta_dpo_variant: Literal["published", "madpo_paper"] = Field(
        "published", description="beta_dpo: its authors' code, or that of the MADPO paper"
    )
    beta_dpo_a: float = Field(0.6, ge=0, description="how strongly beta follows the mean gap")
    beta_dpo_mode_weight: float = Field(
        0.2, ge=0, lt=1, description="share of the pairs that beta_dpo's filter drops per batch"
    )

    nll_loss_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the chosen response's mean negative log-prob per token, added to "
        "the loss",
    )
    weight_column: str | None = Field(
        None, description="kept column that multiplies each pair's loss; finite, not negative"
    )
    merge_adapter: bool = Field(
        False, description="write full float32 weights with LoRA merged in, not an adapter"
    )

    @model_validator(mode="after")
    def _check_smoothing(self) -> "PolicyConfig":
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing belongs to loss_type sigmoid, not {self.loss_type}: remove it"
            )
        return self

    @property
    def weighting(self) -> dict[str, float]:
        """The arguments of MADPO's weight."""
        return {name: getattr(self, name) for name in ("c_min", "c_max", "lmbda", "tau")}

    @field_validator("c_min")
    @classmethod
    def _check_c_min(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"must be strictly between 0 and 1 ({_explain_one('c_min')})")
        return value

    @field_validator("c_max")
    @classmethod
    def _check_c_max(cls, value: float) -> float:
        if not value > 1:
            raise ValueError(f"must be above 1 ({_explain_one('c_max')})")
        return value

    @field_validator("tau")
    @classmethod
    def _check_tau(cls, value: float) -> float:
        if not value > 0:
            raise ValueError("must be above 0: the |margin| at which the weight is 1 again")
        return value


def _explain_one(key: str) -> str:
    return (
        f"{key} = 1 makes the weight 0/0; if every weight is 1, MADPO is DPO: use loss_type sigmoid"
    )
