"""A training job: all that a worker needs to know, pickled to it; and the three tasks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import torch
from torch import nn

from madpo_ray.artifacts.tables import rows_fingerprint
from madpo_ray.columns import CHOSEN_IDS, RESPONSE_IDS, TRAIN, VALIDATION
from madpo_ray.config import ModelConfig, PolicyConfig, RewardConfig, TrainingConfig
from madpo_ray.data.order import OrderSpec
from madpo_ray.models.attention import load_architecture, may_pack
from madpo_ray.models.devices import use_device
from madpo_ray.models.loading import (
    READS_END,
    TaskType,
    load_policy,
    load_policy_float32,
    load_tokenizer,
    new_reward_model,
)
from madpo_ray.models.logprobs import ResponseLogps, ResponseRewards
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.scoring.streamed import StreamedScores
from madpo_ray.training.objectives import PolicyObjective, RewardObjective, SFTObjective
from madpo_ray.training.protocols import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(Protocol):
    """What is trained: the part of a stage that runs inside the workers."""

    @property
    def task_type(self) -> TaskType:
        """peft's name of it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Float columns of the rows that the objective reads."""

    @property
    def responses(self) -> tuple[str, ...]:
        """The responses of a pair that the model reads."""

    def load(self, job: "TrainingJob", max_response_tokens: int) -> nn.Module:
        """The module that maps a micro-batch to outputs; its `model` is trained."""

    def objective(self, job: "TrainingJob") -> Objective: ...

    def tokenizer(self, job: "TrainingJob") -> "PreTrainedTokenizerBase":
        """What is saved next to the trained model."""

    def merge_base(self, job: "TrainingJob") -> nn.Module | None:
        """A complete model to merge trained LoRA into; None if the adapter is the result."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs. A trial of a search is `dataclasses.replace(job, ...)`."""

    stage: str
    fingerprint: str  # with `stage` and `trial` it names the run; the same name resumes
    task: Task
    settings: TrainingConfig
    model: ModelConfig
    seed: int
    num_threads: int  # of this rank
    base_folder: Path  # the model that training starts from, and LoRA's base
    rows: Path  # folder of Parquet files with tokens and the task's columns
    output: Path  # gets model/, metrics.jsonl and tensorboard/ at the end
    storage: Path  # Ray's storage: checkpoints and metrics of all runs
    trial: str = ""
    export: bool = True  # write to `output`; Tune's trials do not
    deadline: float | None = None  # time.time() at which to save and exit
    streamed: StreamedScores | None = None  # the columns that the rows lack
    fold: tuple[int, int] | None = None  # (k, K): train without the pairs of fold k of K

    @property
    def name(self) -> str:
        """The run's name in Ray's storage."""
        name = f"{self.stage}-{self.fingerprint[:16]}"
        return f"{name}-{self.trial}" if self.trial else name

    @property
    def portable_base(self) -> str:
        """The base as an adapter names it.

        One in the run by its path from the adapter (`../../sft/model`), so that a copied run does
        not lead back to the one that it was copied from; a model of the hub by its name there.
        """
        run = self.storage.parent
        if self.base_folder.is_relative_to(run):
            adapter = run / self.stage / "model"
            return os.path.relpath(self.base_folder, adapter)
        name = self.model.model_name_or_path
        return str(self.base_folder) if Path(name).is_absolute() else name

    @property
    def checkpoints(self) -> Path:
        """The run's folder in Ray's storage."""
        return self.storage / self.name

    @property
    def metrics(self) -> Path:
        """Where metrics are written during the run, next to the checkpoints."""
        return self.checkpoints / "metrics"

    @property
    def stop_file(self) -> Path:
        """If this file is not empty, every rank saves and exits after the current step.

        It is created, empty, before the ranks start and read instead of tested for existence: NFS
        clients cache a missing file for up to a minute.
        """
        return self.checkpoints / "stop"

    def is_asked_to_stop(self) -> bool:
        try:
            return bool(self.stop_file.read_bytes())
        except FileNotFoundError:
            return False

    def may_pack(self) -> bool:
        """Whether a micro-batch may be one packed row; ranks find out at load."""
        trust = self.model.trust_remote_code
        architecture = load_architecture(self.base_folder, trust_remote_code=trust)
        return may_pack(self.model, architecture)

    @property
    def complete(self) -> Callable[[pa.Table], pa.Table] | None:
        """Adds the columns that the rows lack to a table of pairs that have been scored."""
        return None if self.streamed is None else self.streamed.complete

    def _row_columns(self) -> tuple[str, ...]:
        """The columns that are read from the rows."""
        if self.streamed is None:
            return self.task.columns
        own = [name for name in self.task.columns if name not in self.streamed.columns]
        return tuple(dict.fromkeys([*own, *self.streamed.row_columns]))

    def _token_files(self, split: str) -> Path:
        """Where the tokens of a split are as flat files; the same for all trials of a search."""
        rows = rows_fingerprint(self.rows)[:16]
        return self.storage / f"{self.stage}-tokens-{rows}" / split

    def order_spec(self, num_workers: int) -> OrderSpec:
        """The order of the pairs to train on."""
        settings = self.settings
        return OrderSpec(
            rows=self.rows,
            token_files=self._token_files(TRAIN),
            split=TRAIN,
            columns=self._row_columns(),
            seed=self.seed,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.per_device_train_batch_size,
            num_workers=num_workers,
            max_tokens=settings.max_tokens_per_device,
            packed=self.may_pack(),
            responses=self.task.responses,
            fold=self.fold,
            num_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
        )

    def validation_order_spec(self, num_workers: int) -> OrderSpec:
        """The order of the validation pairs: one step, not shuffled."""
        settings = self.settings
        return OrderSpec(
            rows=self.rows,
            token_files=self._token_files(VALIDATION),
            split=VALIDATION,
            columns=self._row_columns(),
            seed=self.seed,
            global_batch_size=None,
            micro_batch_size=settings.per_device_eval_batch_size,
            num_workers=num_workers,
            max_tokens=settings.max_tokens_per_device,
            packed=self.may_pack(),
            responses=self.task.responses,
            is_shuffled=False,
        )


def _load_language_model(job: TrainingJob, max_response_tokens: int) -> ResponseLogps:
    """A policy to train."""
    model = load_policy(job.base_folder, job.model, device=use_device())
    model = prepare_for_training(model, job.settings, task_type="CAUSAL_LM")
    # Under ZeRO-3 every rank reads equally many chunks of the head.
    bound = max_response_tokens if job.settings.zero_stage == 3 else None
    return ResponseLogps(model, bound)


@dataclass(frozen=True)
class PolicyTask:
    """DPO and its relatives, on stored reference log-probs."""

    columns: tuple[str, ...]
    task_type: TaskType = "CAUSAL_LM"
    responses: tuple[str, ...] = RESPONSE_IDS

    def load(self, job: TrainingJob, max_response_tokens: int) -> nn.Module:
        return _load_language_model(job, max_response_tokens)

    def objective(self, job: TrainingJob) -> Objective:
        assert isinstance(job.settings, PolicyConfig)
        return PolicyObjective(job.settings, job.seed)

    def tokenizer(self, job: TrainingJob) -> "PreTrainedTokenizerBase":
        return load_tokenizer(job.base_folder, job.model)

    def merge_base(self, job: TrainingJob) -> nn.Module | None:
        assert isinstance(job.settings, PolicyConfig)
        if not job.settings.merge_adapter:
            return None
        return load_policy_float32(job.base_folder, job.model)


@dataclass(frozen=True)
class SFTTask:
    """Supervised fine-tuning on the chosen responses."""

    task_type: TaskType = "CAUSAL_LM"
    columns: tuple[str, ...] = ()
    responses: tuple[str, ...] = (CHOSEN_IDS,)

    def load(self, job: TrainingJob, max_response_tokens: int) -> nn.Module:
        return _load_language_model(job, max_response_tokens)

    def objective(self, job: TrainingJob) -> Objective:
        return SFTObjective()

    def tokenizer(self, job: TrainingJob) -> "PreTrainedTokenizerBase":
        return load_tokenizer(job.base_folder, job.model)

    def merge_base(self, job: TrainingJob) -> nn.Module:
        return load_policy_float32(job.base_folder, job.model)


@dataclass(frozen=True)
class RewardTask:
    """A Bradley-Terry reward model."""

    task_type: TaskType = "SEQ_CLS"
    columns: tuple[str, ...] = ()
    responses: tuple[str, ...] = RESPONSE_IDS

    def load(self, job: TrainingJob, max_response_tokens: int) -> nn.Module:
        model = self._classifier(job, job.model, device=use_device())
        model = prepare_for_training(model, job.settings, task_type=self.task_type)
        return ResponseRewards(model)

    def objective(self, job: TrainingJob) -> Objective:
        assert isinstance(job.settings, RewardConfig)
        return RewardObjective(job.settings)

    def tokenizer(self, job: TrainingJob) -> "PreTrainedTokenizerBase":
        """With a pad token that never ends a response.

        Plain transformers reads the reward at the last token that is not padding.
        """
        tokenizer: Any = load_tokenizer(job.base_folder, job.model)
        candidates = [
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
            tokenizer.bos_token_id,
            *tokenizer.all_special_ids,
            0,
            1,
        ]
        tokenizer.pad_token_id = next(
            int(token)
            for token in candidates
            if token is not None and token != tokenizer.eos_token_id
        )
        return tokenizer

    def merge_base(self, job: TrainingJob) -> nn.Module:
        """Always merged, so that scoring reads one model; stored in float32, scored in `dtype`."""
        return self._classifier(job, job.model.model_copy(update={"dtype": "float32"}))

    def _classifier(
        self, job: TrainingJob, model_config: ModelConfig, *, device: torch.device | None = None
    ) -> nn.Module:
        model = new_reward_model(job.base_folder, model_config, device=device)
        config: Any = model.config
        config.pad_token_id = self.tokenizer(job).pad_token_id
        setattr(config, READS_END, True)
        return model
