"""Sections run, cluster, model and data: where a run lives, what it runs on, what it reads."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from madpo_ray import columns
from madpo_ray.config.base import Section, Strings, operational


class RunConfig(Section):
    name: str = Field(
        "madpo",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="name of the run's folder",
    )
    storage_path: str = Field(
        "runs", description="folder that every node mounts; results go to storage_path/name"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of splits, order, initialisation, dropout and sampling"
    )
    max_wall_time: float | None = Field(
        None,
        gt=0,
        description="seconds after which a training saves and exits with code 75; "
        "the same command resumes",
    )

    keep_checkpoints: bool = Field(
        False, description="keep a training's checkpoints after its stage is finished"
    )

    @property
    def folder(self) -> Path:
        return Path(self.storage_path) / self.name

    @property
    def ray_folder(self) -> Path:
        """Where trainings keep their checkpoints and metrics."""
        return self.folder / "ray"

    def deadline(self, began: float) -> float | None:
        """When a command that began at `began` (time.time()) has to save and exit."""
        return None if self.max_wall_time is None else began + self.max_wall_time


class ClusterConfig(Section):
    address: str | None = Field(
        None, description="Ray address; null: RAY_ADDRESS if set, else a local Ray is started"
    )
    num_workers: int = Field(
        1,
        ge=1,
        description="training workers; also scoring actors, unless scoring.min_actors is set",
    )
    use_gpu: bool = Field(False, description="give each worker a GPU")
    gpus_per_worker: float = operational(
        1.0,
        gt=0.5,
        le=1,
        description="share of a GPU per worker, with cluster.use_gpu; scoring actors may have the "
        "rest, but no other worker: NCCL refuses two ranks on one GPU",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs per worker; its threads")
    autoscaling: bool = Field(
        False, description="the cluster can add nodes, so do not check that the workers fit now"
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="restarts of the workers without progress in between; -1: no limit. The same "
        "error twice at one step ends a training at once",
    )
    connect_timeout_s: float = Field(
        10.0, gt=0, description="seconds until a cluster that does not answer is an error"
    )
    placement_timeout_s: float = Field(
        600.0,
        gt=0,
        description="seconds until workers that are not placed, or actors that are not placed with "
        "their models loaded, are an error",
    )
    collective_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="seconds that ranks wait for each other; the longest is for rank 0 while it "
        "checks a checkpoint, or converts it for another number of ranks",
    )

    @property
    def worker_resources(self) -> dict[str, float]:
        """Resources of one worker, by Ray's names."""
        resources = {"CPU": self.cpus_per_worker}
        if self.use_gpu:
            resources["GPU"] = self.gpus_per_worker
        return resources

    @property
    def worker_description(self) -> str:
        """Such as `2 CPUs and a GPU`."""
        gpu = "a GPU" if self.gpus_per_worker == 1 else f"{self.gpus_per_worker:g} of a GPU"
        return f"{self.cpus_per_worker:g} CPUs" + (f" and {gpu}" if self.use_gpu else "")

    @property
    def num_threads(self) -> int:
        """CPU threads of one worker or actor."""
        return max(1, int(self.cpus_per_worker))


class ModelConfig(Section):
    model_name_or_path: str = Field(
        description="hub name, folder in transformers' format, or a .gguf file"
    )
    model_revision: str = Field("main", description="branch, tag or commit of a hub name")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the weights, in training and scoring; with cluster.use_gpu the default is "
        "bfloat16",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="transformers' name; for sampling, and where rows are not packed"
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model brings")
    chat_template_path: str | None = Field(
        None, description="Jinja file that replaces the tokenizer's chat template"
    )
    load_in_4bit: bool = Field(
        False,
        description="policy in NF4 (QLoRA), for GPUs; needs train.use_peft and bitsandbytes",
    )
    use_liger_kernel: bool = Field(
        False,
        description="Liger's fused norms, rotary embedding and MLPs, on GPUs; needs liger-kernel",
    )
    torch_compile: bool = Field(
        False,
        description="compile each layer apart from its attention, in training and scoring; takes a "
        "minute at the first step; not with ZeRO-3 or gradient_checkpointing",
    )
    packed_rows: Literal["auto", "off"] = Field(
        "auto",
        description="auto: all pairs of a micro-batch in one row, each prompt once, if that gives "
        "the model's own log-probs (compared at load); off: a row per response, padded",
    )

    def numerics(self) -> dict[str, Any]:
        """How the model computes, as far as it affects results; for fingerprints."""
        names = {
            "dtype",
            "attn_implementation",
            "load_in_4bit",
            "use_liger_kernel",
            "torch_compile",
        }
        return self.model_dump(mode="json", include=names)

    def names(self) -> dict[str, Any]:
        """The config's names of model and tokenizer; their content is hashed separately."""
        return self.model_dump(
            mode="json", include={"model_name_or_path", "model_revision", "chat_template_path"}
        )


# Object stores that files of pairs may be in, by the beginning of their URIs. pyarrow reads them.
STORES = ("s3", "gs", "hf")


def is_remote(name: str) -> bool:
    """Whether a name of data.files is a URI, not a path."""
    return "://" in name


def _split_alias(column: str) -> tuple[str, str]:
    """The column of a file, and its name in artifacts."""
    own, is_renamed, name = column.rpartition(" as ")
    return (own.strip(), name.strip()) if is_renamed else (column, column)


class DataConfig(Section):
    files: Strings = Field(
        min_length=1,
        description="files of preference pairs as TRL's, folders of them, or patterns; also in "
        "stores: s3://, gs://, and hf://datasets/ for the hub",
    )
    prompt_column: str = Field("prompt", description="column with the prompt")
    chosen_column: str = Field("chosen", description="column with the preferred response")
    rejected_column: str = Field("rejected", description="column with the other response")
    system_column: str | None = Field(
        None, description="column with a system message; may be empty in some rows"
    )
    responses_column: str | None = Field(
        None, description="column with a list of responses, instead of chosen and rejected"
    )
    scores_column: str | None = Field(
        None, description="column with the scores of the responses, a list of numbers"
    )
    pairing: Literal["all", "best_vs_worst", "best_vs_random"] = Field(
        "best_vs_worst",
        description="which of several responses make pairs; those of equal score make none",
    )
    implicit_prompt: bool = Field(
        False,
        description="texts without a prompt column: their common beginning is the prompt. "
        "(Messages that share their first turns need no setting)",
    )
    ignore_columns: Strings = Field(
        (),
        description="columns that may be left out, although their names (system, history, images, "
        "input, ...) say that they belong to the prompt",
    )
    split_column: str | None = Field(
        None, description="column with train, validation or test; null: split by hash of the group"
    )
    group_column: str | None = Field(
        None, description="pairs with one value stay in one split; null: the prompt is the group"
    )
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the groups, if split_column is null"
    )
    test_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the groups, if split_column is null"
    )
    max_length: int = Field(1024, ge=2, description="tokens of prompt + response")
    over_length: Literal["truncate", "drop", "reject"] = Field(
        "truncate",
        description="pairs longer than max_length. truncate: responses are cut at the end; drop: "
        "left out; reject: left out, and counted as rejected",
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="exact duplicates of an earlier pair"
    )
    contradictions: Literal["keep", "drop", "majority"] = Field(
        "keep",
        description="pairs that also occur with chosen and rejected swapped. majority: keep the "
        "direction that occurs more often, or none",
    )
    keep_columns: Strings = Field(
        (),
        description="numeric columns to carry along to the margins artifact; `margin as my_margin` "
        "renames one",
    )
    max_reject_fraction: float = operational(
        0.5, ge=0, le=1, description="share of rejected rows above which the run stops"
    )

    @property
    def kept_columns(self) -> dict[str, str]:
        """`keep_columns` by their names in artifacts, with their names in the files."""
        return {name: column for column, name in map(_split_alias, self.keep_columns)}

    @field_validator("keep_columns")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [name for _, name in map(_split_alias, value)]
        if taken := sorted(columns.RESERVED.intersection(names)):
            raise ValueError(f"{taken[0]}: reserved name; give it another: {taken[0]} as my_score")
        if len(set(names)) < len(names):
            raise ValueError("a column is listed twice")
        if not all(part for column in value for part in _split_alias(column)):
            raise ValueError("a column has no name")
        return value

    @model_validator(mode="after")
    def _check_roles(self) -> "DataConfig":
        columns_of = {
            "prompt_column": self.prompt_column,
            "chosen_column": self.chosen_column,
            "rejected_column": self.rejected_column,
            "system_column": self.system_column,
            "responses_column": self.responses_column,
            "scores_column": self.scores_column,
        }
        seen: dict[str, str] = {}
        for key, name in columns_of.items():
            if name is not None and name in seen:
                raise ValueError(f"{seen[name]} and {key} are both {name!r}")
            if name is not None:
                seen[name] = key
        return self

    @model_validator(mode="after")
    def _check_responses(self) -> "DataConfig":
        if (self.responses_column is None) != (self.scores_column is None):
            raise ValueError("responses_column and scores_column go together: give both")
        return self

    @model_validator(mode="after")
    def _check_fractions(self) -> "DataConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction + test_fraction must be below 1, or no pair is left to train"
            )
        return self
