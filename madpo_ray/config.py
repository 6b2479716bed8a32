"""Every setting once: default, unit, bounds, meaning.

Strict, frozen, and free of torch, ray and deepspeed, so a config is checked in a fraction of a second. Names are
TRL's where TRL has the thing.
"""

import difflib
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class UserError(Exception):
    """The user's input or config is wrong. The message says how to mend it; the command exits with 2 and no
    traceback."""


class ExitCode(enum.IntEnum):
    """What a command returns."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: saved, and the same command goes on
    TERMINATED = 143  # 128 + SIGTERM: the same


class Stopped(Exception):  # noqa: N818 (no error: it did what it was told)
    """A training ended before its end, and says why in one message: it was told to leave, or could not go on."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message, exit_code)
        self.message, self.exit_code = message, exit_code


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Strings = Annotated[tuple[str, ...], Field(strict=False)]


class RunConfig(Section):
    name: str = Field("madpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run's folder")
    storage_path: str = Field(
        "runs", description="folder that every node sees; the run's files go to storage_path/name"
    )
    seed: int = Field(0, ge=0, description="decides splits, order, initialisation and sampling")
    max_wall_time: float | None = Field(
        None, gt=0, description="seconds after which a training saves and leaves with exit code 75; run again to go on"
    )

    @property
    def folder(self) -> Path:
        return Path(self.storage_path) / self.name


class ClusterConfig(Section):
    address: str | None = Field(None, description="Ray address; null takes RAY_ADDRESS, else starts a local Ray")
    num_workers: int = Field(1, ge=1, description="training workers, and scoring actors")
    use_gpu: bool = Field(False, description="one GPU for every worker")
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs of a worker; at least one thread")
    autoscaling: bool = Field(False, description="nodes can still be added, so do not check that the workers fit now")
    max_failures: int = Field(3, ge=-1, description="restarts of the worker group after an error, -1 without limit")


class ModelConfig(Section):
    model_name_or_path: str = Field(description="hub name, folder in transformers' format, or a .gguf file")
    model_revision: str = Field("main", description="branch, tag or commit, for a hub name")
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    trust_remote_code: bool = Field(False, description="run Python code that a model brings")
    chat_template_path: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template")
    load_in_4bit: bool = Field(
        False, description="policy and reference in NF4 (QLoRA), for GPUs; needs train.use_peft and bitsandbytes"
    )
    shared_prefix: Literal["auto", "off"] = Field(
        "auto", description="one row [prompt | chosen | rejected] a pair, where the model's attention allows it"
    )


RESERVED_COLUMNS = frozenset(
    {
        *("pair_id", "group", "split", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"),
        *("chosen_reward", "rejected_reward", "margin", "ref_chosen_logps", "ref_rejected_logps"),
        *("policy_chosen_logps", "policy_rejected_logps", "file", "file_number", "row", "reason", "content_hash"),
    }
)


class DataConfig(Section):
    files: Strings = Field(
        min_length=1, description="Parquet or JSON Lines files with preference pairs in TRL's formats"
    )
    split_column: str | None = Field(
        None, description="column with train, validation or test; null splits by group hash"
    )
    group_column: str | None = Field(None, description="pairs of one group never part; null groups by prompt")
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the groups, where no split_column is given"
    )
    test_fraction: float = Field(0.05, ge=0, lt=1, description="share of the groups, where no split_column is given")
    max_length: int = Field(1024, ge=2, description="tokens of prompt + response; responses are cut at the end")
    keep_columns: Strings = Field((), description="further columns to carry through to the margins")

    @field_validator("keep_columns")
    @classmethod
    def _own_names_are_taken(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if taken := sorted(RESERVED_COLUMNS & set(value)):
            raise ValueError(f"{', '.join(taken)} would stand beside a column of ours with that name: rename it")
        if len(set(value)) < len(value):
            raise ValueError("a column stands there twice")
        return value

    @model_validator(mode="after")
    def _some_pairs_train(self) -> "DataConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must stay below 1: nothing is left to train on")
        return self


class TrainingConfig(Section):
    """What the one loop needs, whatever it trains."""

    metrics: ClassVar[frozenset[str]] = frozenset({"loss"})  # of an evaluation, without its prefix eval_

    learning_rate: float = Field(1e-5, gt=0)
    global_batch_size: int = Field(32, ge=1, description="pairs per optimizer step, over all workers")
    per_device_train_batch_size: int = Field(8, ge=1, description="pairs of one forward; accumulation follows from it")
    per_device_eval_batch_size: int = Field(8, ge=1, description="pairs of one forward in evaluation")
    max_tokens_per_device: int | None = Field(
        None, ge=1, description="tokens of one forward, padding included, instead of a number of pairs"
    )
    num_train_epochs: int = Field(1, ge=1)
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1 leaves it to num_train_epochs")
    warmup_steps: float = Field(0.03, ge=0, description="optimizer steps; below 1 a share of all")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, ge=0, description="0 does not clip")
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    stage3_param_persistence_threshold: int = Field(
        100_000, ge=0, description="smaller parameters stay whole under ZeRO-3"
    )
    reduce_bucket_size: int = Field(
        500_000_000, ge=1, description="gradients that ranks sum at a time under ZeRO 1 to 3; their buffer's size"
    )
    stage3_max_live_parameters: int = Field(
        1_000_000_000, ge=1, description="parameters that a rank gathers and keeps for a while under ZeRO-3"
    )
    offload_optimizer: bool = Field(False, description="optimizer states in CPU memory; needs zero_stage 2 or 3")
    offload_param: bool = Field(False, description="parameters in CPU memory; needs zero_stage 3")
    gradient_checkpointing: bool = False
    disable_dropout: bool = Field(True, description="every dropout is 0, LoRA's included, as in TRL")
    use_peft: bool = Field(False, description="LoRA instead of all weights")
    lora_r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="0 while disable_dropout is on")
    lora_target_modules: Strings = Field(("all-linear",), description="module names, or all-linear")
    lora_layers_to_transform: tuple[int, ...] = Field(
        (), strict=False, description="layers with LoRA; empty: all (as peft)"
    )
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1, description="optimizer steps between evaluations; null: at the end only")
    save_steps: int | None = Field(500, ge=1, description="optimizer steps between checkpoints; null: at the end only")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept; the newest, and the best, are never deleted")
    metric_for_best_model: str | None = Field(
        None, description="such as eval_loss: every evaluation saves, and the best one's weights are the result"
    )
    greater_is_better: bool | None = Field(None, description="null: not for a metric whose name ends with loss")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="evaluations without a better metric_for_best_model after which training ends"
    )
    skip_nonfinite: int = Field(
        0, ge=0, description="steps with a loss or gradient that is not finite to leave out before the run stops"
    )

    @property
    def best_metric(self) -> tuple[str, bool]:
        """Name of metric_for_best_model in the logs, and whether a greater one is better."""
        assert self.metric_for_best_model is not None
        name = self.metric_for_best_model
        greater = not name.endswith("loss") if self.greater_is_better is None else self.greater_is_better
        return name if name.startswith("eval_") else f"eval_{name}", greater

    @model_validator(mode="after")
    def _offloading_needs_shards(self) -> "TrainingConfig":
        if (self.offload_optimizer and self.zero_stage < 2) or (self.offload_param and self.zero_stage < 3):
            raise ValueError("offload_optimizer needs zero_stage 2 or 3, and offload_param zero_stage 3")
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self) -> "TrainingConfig":
        if self.metric_for_best_model is not None:
            name = self.best_metric[0].removeprefix("eval_")
            if name not in self.metrics:
                raise ValueError(f"metric_for_best_model: no {name!r} is measured{nearest(name, sorted(self.metrics))}")
        return self

    @model_validator(mode="after")
    def _patience_needs_a_metric(self) -> "TrainingConfig":
        if self.early_stopping_patience is not None and (self.metric_for_best_model is None or self.eval_steps is None):
            raise ValueError("early_stopping_patience needs metric_for_best_model, such as eval_loss, and eval_steps")
        return self

    @model_validator(mode="after")
    def _layers_need_names(self) -> "TrainingConfig":
        if self.lora_layers_to_transform and self.lora_target_modules == ("all-linear",):
            raise ValueError("lora_layers_to_transform needs lora_target_modules by name, such as [q_proj, v_proj]")
        return self


class SFTConfig(TrainingConfig):
    metrics: ClassVar[frozenset[str]] = frozenset({"loss", "entropy"})


class RewardConfig(TrainingConfig):
    metrics: ClassVar[frozenset[str]] = frozenset(
        {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    )

    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="weight of (chosen + rejected reward)^2, as in TRL"
    )


class MarginsConfig(Section):
    calibrate: bool = Field(True, description="divide rewards by the temperature fitted on validation pairs")
    per_device_eval_batch_size: int = Field(8, ge=1, description="pairs of one forward")
    batch_size: int = Field(256, ge=1, description="pairs that one call of an actor sorts by length and scores")


LossType = Literal["sigmoid", "ipo", "ipo_sum", "beta_dpo", "madpo"]


class PolicyConfig(TrainingConfig):
    metrics: ClassVar[frozenset[str]] = frozenset(
        {"loss", "entropy", "logps/chosen", "logps/rejected"}
        | {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    )

    merge_adapter: bool = Field(False, description="write whole float32 weights with LoRA merged in, not an adapter")
    loss_type: LossType = "madpo"
    beta: float = Field(0.1, gt=0, description="base temperature")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="cDPO, for loss_type sigmoid (TRL 1.16 ignores it there)"
    )
    c_min: float = Field(0.25, description="lower bound of the amplifier c; in (0, 1)")
    c_max: float = Field(4.0, description="upper bound of the amplifier c; above 1")
    lmbda: float = Field(1.0, gt=0, description="steepness of c around tau")
    tau: float = Field(7.0, description="margin where the weight turns from amplifying to dampening, in reward units")
    nll_loss_coef: float = Field(
        0.0, ge=0, description="weight of the chosen response's mean negative log-prob, against falling log-probs"
    )
    weight_column: str | None = Field(
        None, description="kept column that multiplies each pair's loss before the mean; finite, not negative"
    )
    beta_dpo_variant: Literal["published", "madpo_paper"] = "published"
    beta_dpo_a: float = Field(0.6, ge=0, description="how strongly beta follows the batch's mean gap")
    beta_dpo_mode_weight: float = Field(0.2, ge=0, lt=1, description="share of pairs that the filter leaves out")

    @model_validator(mode="after")
    def _smoothing_is_sigmoids(self) -> "PolicyConfig":
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss_type sigmoid, not {self.loss_type}: leave it out")
        return self

    @field_validator("c_min")
    @classmethod
    def _c_min(cls, value: float) -> float:
        if not 0 < value < 1:
            reason = "c_min = 1 makes the weight 0/0; where every weight is 1, MADPO is DPO: use loss_type sigmoid"
            raise ValueError(f"must lie strictly between 0 and 1 ({reason})")
        return value

    @field_validator("c_max")
    @classmethod
    def _c_max(cls, value: float) -> float:
        if not value > 1:
            reason = "c_max = 1 makes the weight 0/0; where every weight is 1, MADPO is DPO: use loss_type sigmoid"
            raise ValueError(f"must be above 1 ({reason})")
        return value

    @field_validator("tau")
    @classmethod
    def _tau(cls, value: float) -> float:
        if not value > 0:
            raise ValueError(
                "must be above 0: it is the size of margin at which the weight is 1 again, in reward units"
            )
        return value


class EvaluateConfig(Section):
    chosen_score_column: str | None = Field(None, description="kept column with the chosen response's true score")
    rejected_score_column: str | None = Field(None, description="kept column with the rejected response's true score")
    per_device_eval_batch_size: int = Field(8, ge=1, description="pairs of one forward")
    num_samples: int = Field(32, ge=2, description="sampled responses for the KL estimate")
    num_shown: int = Field(5, ge=1, description="samples of these to print, from before and after the training")
    max_new_tokens: int = Field(64, ge=1)


class Range(Section):
    min: float
    max: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.min < self.max or (self.log and self.min <= 0):
            raise ValueError("a range needs min < max, and min > 0 where log is true")
        return self


class TuneConfig(Section):
    num_samples: int = Field(8, ge=1, description="trials")
    max_concurrent_trials: int = Field(1, ge=1, description="trials at a time; each takes cluster.num_workers workers")
    grace_period: int = Field(1, ge=1, description="evaluations before ASHA may stop a trial")
    search_space: dict[str, Range] = Field(
        {
            "beta": Range(min=0.01, max=0.5, log=True),
            "c_min": Range(min=0.1, max=0.9),
            "c_max": Range(min=1.1, max=6.0),
        },
        description="keys of section train, and their ranges",
    )

    @field_validator("search_space")
    @classmethod
    def _known(cls, value: dict[str, Range]) -> dict[str, Range]:
        numbers = [name for name, field in PolicyConfig.model_fields.items() if field.annotation is float]
        for key in value:
            if key not in numbers:
                raise ValueError(f"{key!r} is no real number of section train{nearest(key, numbers)}")
        return value


class Config(Section):
    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    sft: SFTConfig | None = Field(None, description="null: policy and reference start from the model as it is")
    reward: RewardConfig = RewardConfig()
    margins: MarginsConfig = MarginsConfig()
    train: PolicyConfig = PolicyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _four_bits_are_frozen(self) -> "Config":
        adapter = self.train.use_peft and self.train.zero_stage < 3 and not self.train.merge_adapter
        if self.model.load_in_4bit and not (self.cluster.use_gpu and adapter and self.sft is None):
            raise ValueError(
                "model.load_in_4bit needs cluster.use_gpu, train.use_peft, a train.zero_stage below 3, and neither a "
                "section sft nor train.merge_adapter: 4-bit weights are neither trained nor merged into"
            )
        return self

    @model_validator(mode="after")
    def _kernels_need_gpus(self) -> "Config":
        if self.model.attn_implementation in ("flash_attention_2", "flex_attention") and not self.cluster.use_gpu:
            raise ValueError(
                f"model.attn_implementation: {self.model.attn_implementation} trains on GPUs only: set "
                "cluster.use_gpu, or take sdpa"
            )
        return self

    @model_validator(mode="after")
    def _columns_are_kept(self) -> "Config":
        columns = (self.evaluate.chosen_score_column, self.evaluate.rejected_score_column)
        if (columns[0] is None) != (columns[1] is None):
            raise ValueError("evaluate.chosen_score_column and evaluate.rejected_score_column go together: give both")
        asked = {"evaluate": columns, "train": (self.train.weight_column,)}
        for section, column in ((section, column) for section, names in asked.items() for column in names if column):
            if column not in self.data.keep_columns:
                raise ValueError(f"{section} asks for column {column!r}: add it to data.keep_columns")
        return self


# Keys of a training that change neither weights nor results: a change of theirs redoes nothing.
OPERATIONAL_KEYS = frozenset(
    {
        *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "per_device_eval_batch_size"),
        "skip_nonfinite",  # a run that it lets go on is the run that stopped
    }
)


def settings_of(section: Section) -> dict[str, Any]:
    """The settings of a section that decide its numbers, for fingerprints."""
    operational = set(OPERATIONAL_KEYS) if isinstance(section, TrainingConfig) else set()
    if isinstance(section, TrainingConfig) and section.metric_for_best_model is not None:
        operational.remove("eval_steps")  # the evaluations decide which weights are the result
    return section.model_dump(mode="json", exclude=operational)


def numerics_of(model: ModelConfig) -> dict[str, Any]:
    """How a model computes, as far as it shows in the numbers."""
    return model.model_dump(mode="json", include={"dtype", "attn_implementation", "load_in_4bit"})


def tokens_of(model: ModelConfig) -> dict[str, str | None]:
    """What the config says about the tokens of a text; their content is hashed beside it."""
    return model.model_dump(mode="json", include={"model_name_or_path", "model_revision", "chat_template_path"})


def nearest(key: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """`; did you mean 'x'?`, or an empty string where nothing is near."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(sorted(known))}"
