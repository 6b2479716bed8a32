"""Needs as lines and tables for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from madpo_ray.sizing.gpus import Cluster
from madpo_ray.sizing.passes import PassNeeds
from madpo_ray.sizing.plan import Needs
from madpo_ray.sizing.trainings import SizedSettings, TrainingNeeds

PAIRS = 100_000  # for which hours are given
GIB = 2**30


def needs_tables(needs: Needs, cluster: Cluster) -> Iterator[str | Table]:
    """The needs for a terminal."""
    lengths = needs.lengths
    yield (
        f"model: {needs.model_type}, {needs.dtype}; every pair has a prompt of {lengths.prompt} "
        f"tokens and responses of {lengths.response}"
    )
    yield (
        f"GPUs: {cluster.nodes} x {cluster.gpus_per_node} {cluster.name}, planned with "
        f"{_gib(cluster.limit)} GiB of each"
    )
    if needs.dtype == "float32":
        yield "float32 is the dtype: set cluster.use_gpu, or model.dtype, for bfloat16"
    for training in needs.trainings:
        yield _training_table(training, cluster)
        yield from _training_lines(training, cluster)
    yield _pass_table(needs.passes, cluster)


def _training_table(training: TrainingNeeds, cluster: Cluster) -> Table:
    footprint = training.footprint
    table = Table(
        title=f"{training.stage}: GiB per GPU; {footprint.parameters / 1e9:.2f} B parameters, "
        f"{footprint.trained / 1e9:.3g} B trained; {training.shape.pairs} pairs per forward, "
        f"{footprint.tokens} tokens"
    )
    headings = ("ZeRO", "weights", "optimizer", "gradients", "buckets", "activa-\ntions", "peak")
    for heading in (*headings, "recom-\nputed"):
        table.add_column(heading, justify="right")
    for stage, memory in training.by_zero_stage.items():
        recomputed = training.recomputed[stage]
        parts = (memory.weights, memory.optimizer, memory.gradients, memory.buckets)
        table.add_row(
            str(stage),
            *(_gib(size) for size in (*parts, memory.activations)),
            _peak(memory.peak, cluster),
            _peak(recomputed.peak, cluster),
        )
    table.caption = f"recomputed: peak with gradient_checkpointing; * does not fit {cluster.name}"
    return table


def _training_lines(training: TrainingNeeds, cluster: Cluster) -> Iterator[str]:
    name = training.stage
    configured = training.configured
    verdict = "fits" if configured.memory.peak <= cluster.limit else "does not fit"
    yield f"{name}: as configured it needs {_needed(configured)}, which {verdict}"
    if training.fitting is None:
        yield f"{name}: no settings fit: more or larger GPUs, shorter pairs, or LoRA (use_peft)"
    else:
        fitting = training.fitting
        yield f"{name}: first settings that fit: {_settings(fitting.changes)}"
        yield f"{name}: with those it needs {_needed(fitting)}"
    which = "those" if training.fitting else "these"
    size = f"{training.checkpoint / 1e9:.1f} GB in all"
    yield f"{name}: a checkpoint with {which} settings takes {size}"
    speed = training.pairs_per_second
    tokens = speed * training.footprint.tokens / training.shape.pairs
    yield (
        f"{name}: {tokens:,.0f} tokens/s, {speed:.1f} pairs/s at {cluster.utilisation:.0%} of the "
        f"GPUs' peak; {PAIRS:,} pairs take {_hours(speed)} hours"
    )
    if training.times > 1:
        yield f"{name}: it trains {training.times} times (folds), each without a fold of the pairs"
    if training.idle:
        yield (
            f"{name}: GPUs are idle for {training.idle:.0%} of that: global_batch_size has too few "
            "micro-batches for all of them"
        )


def _pass_table(passes: list[PassNeeds], cluster: Cluster) -> Table:
    table = Table(title="scoring and sampling: GiB per GPU")
    for heading in ("stage", "weights", "activations or cache", "peak"):
        table.add_column(heading, justify="right")
    table.add_column(f"hours for {PAIRS:,} pairs", justify="right")
    for one in passes:
        hours = "-" if one.pairs_per_second is None else _hours(one.pairs_per_second)
        table.add_row(
            one.name, _gib(one.weights), _gib(one.activations), _peak(one.peak, cluster), hours
        )
    table.caption = (
        "not counted: judges and reward models of others, and passes that score samples; "
        f"* does not fit {cluster.name}"
    )
    return table


def _peak(size: int, cluster: Cluster) -> str:
    return _gib(size) + ("" if size <= cluster.limit else " *")


def _needed(choice: SizedSettings) -> str:
    return (
        f"{_gib(choice.memory.peak)} GiB per GPU and {_gib(choice.host)} GiB of host memory per "
        "node"
    )


def _settings(changes: Mapping[str, Any]) -> str:
    shown = [f"{key}: {str(value).lower()}" for key, value in changes.items()]
    return ", ".join(shown) or "as they are"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _hours(pairs_per_second: float) -> str:
    return f"{PAIRS / pairs_per_second / 3600:.2g}"
