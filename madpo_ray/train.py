"""Stage 4: the policy, trained on stored margins and reference log-probs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo_ray import margins, sft
from madpo_ray.artifacts import Inputs, building, require
from madpo_ray.batching import MicroBatch
from madpo_ray.cluster import connected
from madpo_ray.config import Config, PolicyConfig, UserError, numerics_of, settings_of
from madpo_ray.launch import train_on_ray
from madpo_ray.logprobs import PairLogps
from madpo_ray.loop import Objective, Stateless, Terms
from madpo_ray.losses import BetaStatistics, beta_dpo_batch, beta_dpo_loss, dpo_loss, ipo_loss, madpo_loss, madpo_weight
from madpo_ray.metrics import read_metrics
from madpo_ray.models import load_exact, load_policy, load_tokenizer, prepare_for_training
from madpo_ray.plan import TOKEN_COLUMNS
from madpo_ray.tables import parquet_folder, read_split
from madpo_ray.worker import TrainingJob


def inputs(config: Config) -> Inputs:
    settings: dict[str, Any] = {
        "margins": margins.inputs(config).fingerprint,
        "seed": config.run.seed,
        "model": numerics_of(config.model),
        "train": settings_of(config.train),
    }
    if config.train.loss_type == "beta_dpo":  # its statistics are those of a micro-batch of all workers
        settings["num_workers"] = config.cluster.num_workers
    return Inputs("train", settings, {"model": sft.start_inputs(config).fingerprint})


def folder(config: Config) -> Path:
    return config.run.folder / "train"


@dataclass(frozen=True)
class Logps:
    """Log-probs of a micro-batch, each (B,), and what follows from them."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor], batch: MicroBatch) -> "Logps":
        chosen, rejected = outputs["logps"].chunk(2)
        references = (batch.columns[name].to(chosen.dtype) for name in ("ref_chosen_logps", "ref_rejected_logps"))
        return cls(chosen, rejected, *references)

    @property
    def logratio(self) -> Tensor:
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    def length_normalised(self, lengths: Tensor) -> Tensor:
        """The difference of log-ratios, each divided by its own response's length; `lengths` is (2B,)."""
        chosen, rejected = lengths.chunk(2)
        return (self.chosen - self.ref_chosen) / chosen - (self.rejected - self.ref_rejected) / rejected


class PolicyObjective(Stateless):
    """The losses that need one pair at a time: sigmoid, ipo, ipo_sum, madpo."""

    def __init__(self, settings: PolicyConfig) -> None:
        self._settings = settings
        self._weighting = {name: getattr(settings, name) for name in ("c_min", "c_max", "lmbda", "tau")}

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        logps = Logps.of(outputs, batch)
        return self._terms(self._preference_loss(logps, batch), logps, outputs, batch)

    def _terms(self, preference_loss: Tensor, logps: Logps, outputs: Mapping[str, Tensor], batch: MicroBatch) -> Terms:
        """A pair's whole loss (B,), with what stands beside the preference loss, and its metrics."""
        settings, metrics = self._settings, self._metrics(logps, outputs, batch)
        loss = preference_loss
        if settings.nll_loss_coef:
            metrics["nll_loss"] = -logps.chosen / batch.response_lengths.chunk(2)[0]
            loss = loss + settings.nll_loss_coef * metrics["nll_loss"]
        if settings.weight_column is not None:
            loss = loss * batch.columns[settings.weight_column].to(loss)
        return Terms(loss, metrics)

    def _preference_loss(self, logps: Logps, batch: MicroBatch) -> Tensor:
        settings = self._settings
        match settings.loss_type:
            case "sigmoid":
                return dpo_loss(logps.logratio, beta=settings.beta, label_smoothing=settings.label_smoothing)
            case "ipo":
                return ipo_loss(logps.length_normalised(batch.response_lengths), beta=settings.beta)
            case "ipo_sum":
                return ipo_loss(logps.logratio, beta=settings.beta)
            case "madpo":
                margin = batch.columns["margin"].to(logps.chosen.dtype)
                return madpo_loss(logps.logratio, margin, beta=settings.beta, **self._weighting)
            case other:
                raise ValueError(f"{other} needs an objective of its own")

    def _metrics(self, logps: Logps, outputs: Mapping[str, Tensor], batch: MicroBatch) -> dict[str, Tensor]:
        """TRL's metrics, and ours of margins and weights; each (B,)."""
        beta, margin = self._settings.beta, batch.columns["margin"]
        chosen, rejected = (
            beta * value for value in (logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected)
        )
        entropy = outputs["entropy"] * batch.response_lengths
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": logps.chosen,
            "logps/rejected": logps.rejected,
            "entropy": entropy.view(2, -1).sum(0) / batch.response_lengths.view(2, -1).sum(0),
            "margin/mean": margin,
            "margin/negative_fraction": (margin < 0).float(),
        }
        if self._settings.loss_type == "madpo":
            weight = madpo_weight(margin, **self._weighting)
            metrics |= {f"weight/{name}": weight for name in ("mean", "min", "max")} | {"weight/squared": weight**2}
        return metrics


class BetaDPOObjective(PolicyObjective):
    """beta-DPO: one beta and one mask for a micro-batch of all ranks, from running statistics of the gaps.

    `published` follows junkangwu/beta-DPO. `madpo_paper` is what the MADPO authors' table used: gaps scaled by beta,
    statistics per optimizer step from (0, 1), beta from the mean over all pairs, without a floor.
    """

    def __init__(self, settings: PolicyConfig, seed: int) -> None:
        super().__init__(settings)
        self._paper = settings.beta_dpo_variant == "madpo_paper"
        self._statistics = BetaStatistics(torch.tensor(0.0), torch.tensor(1.0 if self._paper else 0.0))
        self._gaps: list[Tensor] = []  # of the optimizer step, over all ranks
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        logps, settings = Logps.of(outputs, batch), self._settings
        if not training:
            return self._terms(dpo_loss(logps.logratio, beta=settings.beta), logps, outputs, batch)
        scale = settings.beta if self._paper else 1.0
        gaps, own = _gather(logps.logratio.detach() * scale, batch.valid > 0)
        if self._paper:
            self._gaps.append(gaps.cpu())
        else:
            self._statistics = self._statistics.updated(gaps.cpu())
        beta, kept = beta_dpo_batch(
            gaps.cpu(),
            self._statistics,
            beta=settings.beta,
            a=settings.beta_dpo_a,
            mode_weight=settings.beta_dpo_mode_weight,
            generator=self._generator,
        )
        if self._paper and len(gaps):
            beta = settings.beta * (1 + settings.beta_dpo_a * (gaps.cpu().mean() - self._statistics.mean))
        mask = torch.zeros_like(batch.valid)
        mask[batch.valid > 0] = kept[own].to(mask)
        # The mean over kept pairs, written as the mean over all that the loop takes.
        loss = beta_dpo_loss(logps.logratio, beta=beta.to(logps.chosen)) * mask * (len(kept) / max(int(kept.sum()), 1))
        terms = self._terms(loss, logps, outputs, batch)
        return Terms(terms.loss, terms.metrics | {"beta/effective": torch.full_like(batch.valid, float(beta))})

    def end_step(self) -> None:
        if self._paper:
            self._statistics = self._statistics.updated(torch.cat(self._gaps))
            self._gaps = []

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": tuple(self._statistics), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._statistics, self._gaps = BetaStatistics(*state["statistics"]), []
        self._generator.set_state(state["generator"])


def _gather(values: Tensor, valid: Tensor) -> tuple[Tensor, slice]:
    """The valid values (n,) of all ranks, in the order of ranks, and where this rank's own lie."""
    own = values[valid]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own, slice(0, len(own))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own.cpu())
    before = sum(len(part) for part in ranks[: dist.get_rank()])
    return torch.cat(ranks), slice(before, before + len(own))


@dataclass(frozen=True)
class PolicyTask:
    task_type: str = "CAUSAL_LM"
    columns: tuple[str, ...] = ("margin", "ref_chosen_logps", "ref_rejected_logps")
    responses: tuple[str, ...] = TOKEN_COLUMNS[1:]

    def settings(self, config: Config) -> PolicyConfig:
        return config.train

    def load(self, config: Config, base: Path, max_response_tokens: int) -> nn.Module:
        model = prepare_for_training(load_policy(base, config.model), config.train, task_type=self.task_type)
        return PairLogps(model, max_response_tokens)

    def objective(self, config: Config) -> Objective:
        if config.train.loss_type == "beta_dpo":
            return BetaDPOObjective(config.train, config.run.seed)
        return PolicyObjective(config.train)

    def tokenizer(self, config: Config, base: Path) -> Any:
        return load_tokenizer(base, config.model)

    def fresh_base(self, config: Config, base: Path) -> nn.Module | None:
        return load_exact(base, config.model) if config.train.merge_adapter else None


def job(config: Config, *, output: Path, experiment: str, export: bool = True) -> TrainingJob:
    """The training that the config describes; Tune's trials are the same job under other names."""
    weight = config.train.weight_column
    return TrainingJob(
        task=PolicyTask(columns=(*PolicyTask.columns, *([weight] if weight else []))),
        config=config,
        base=sft.start_folder(config),
        source=parquet_folder(margins.folder(config)),
        output=output,
        experiment=experiment,
        export=export,
    )


def run(config: Config) -> Path:
    """Trains the policy; its artifact holds `model/` (a LoRA adapter, or whole weights), `metrics.jsonl` and
    TensorBoard files."""
    require(margins.folder(config), margins.inputs(config))
    check_weights(config)
    stage = inputs(config)
    with building(folder(config), stage) as (partial, results):
        with connected(config.cluster):
            outcome = train_on_ray(job(config, output=partial, experiment=stage.experiment))
        results.update(outcome.evaluation(read_metrics(partial / "metrics.jsonl")))
    return folder(config)


def check_weights(config: Config) -> None:
    """Raises UserError where a pair's own weight is missing, negative or not finite."""
    column = config.train.weight_column
    if column is None:
        return
    for split in ("train", "validation"):
        table = read_split(parquet_folder(margins.folder(config)), split, ("pair_id", column))
        weights = table[column].to_numpy()
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            ids = ", ".join(table["pair_id"].take(bad[:5]).to_pylist())
            raise UserError(
                f"train.weight_column: {column} is missing, negative or not finite for {len(bad)} pairs, such as "
                f"{ids}: mend the column in data.files"
            )


def describe(results: Mapping[str, Any]) -> str:
    """The last evaluation in a line."""
    return (
        f"step {results['step']}: eval_loss {results['eval_loss']:.4f}, "
        f"eval_rewards/accuracies {results['eval_rewards/accuracies']:.3f}, "
        f"eval_rewards/margins {results['eval_rewards/margins']:.4f}"
    )
