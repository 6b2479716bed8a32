"""Scoring side by side with a plain transformers loop, and streamed margins with stored ones.

Log-probs of chosen and rejected responses under a random Llama, the same for both sides: ours
through `PolicyLogps`, theirs as a padded batch of 8 pairs, chosen and rejected concatenated, with
full logits. They are compared to 1e-4. Then the Ray pass against the bare scorer, two actors of one
thread against one, and an epoch that is scored while it trains against scoring, then training. The
last line is one JSON object.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from benchmark_training import make_model, make_pairs, make_rows
from transformers import AutoModelForCausalLM

from madpo_ray import pipeline
from madpo_ray.artifacts.tables import read_columns
from madpo_ray.cluster.connection import connected
from madpo_ray.columns import REF_LOGPS, TOKEN_COLUMNS
from madpo_ray.config import (
    ActorPool,
    ClusterConfig,
    Config,
    ForwardOptions,
    ModelConfig,
    parse_config,
)
from madpo_ray.passes import BatchNotes
from madpo_ray.scoring.actors import score_rows
from madpo_ray.scoring.scorers import PolicyLogps
from madpo_ray.stages import margins, pairs, train

BATCH_SIZE = 8
COMPARED_PAIRS = 64
TOLERANCE = 1e-4


class PlainLoop:
    """What a user would write with transformers."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, rows: pa.Table) -> np.ndarray:
        """Log-probs (2, P) of chosen and rejected responses."""
        found = []
        all_pairs = rows.select(list(TOKEN_COLUMNS)).to_pylist()
        for start in range(0, len(all_pairs), BATCH_SIZE):
            batch = all_pairs[start : start + BATCH_SIZE]
            texts = [
                (pair["prompt_ids"], pair[name])
                for name in ("chosen_ids", "rejected_ids")
                for pair in batch
            ]
            found.append(self._logps(texts).view(2, -1))
        return torch.cat(found, dim=1).double().numpy()

    def _logps(self, texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        width = max(len(prompt) + len(response) for prompt, response in texts)
        input_ids = torch.zeros(len(texts), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        is_response = torch.zeros_like(input_ids)
        for i, (prompt, response) in enumerate(texts):
            length = len(prompt) + len(response)
            input_ids[i, :length] = torch.tensor(prompt + response)
            attention_mask[i, :length] = 1
            is_response[i, len(prompt) : length] = 1
        logits = self._model(input_ids=input_ids, attention_mask=attention_mask).logits
        distribution = logits[:, :-1].float().log_softmax(-1)
        of_tokens = distribution.gather(2, input_ids[:, 1:, None])[..., 0]
        logps: torch.Tensor = (of_tokens * is_response[:, 1:]).sum(1)
        return logps


def scorer_of(model: Path) -> PolicyLogps:
    config = ModelConfig(model_name_or_path=str(model))
    return PolicyLogps(model, config, columns=REF_LOGPS, forward=ForwardOptions(BATCH_SIZE))


def compare_loops(work: Path, model: Path, shape: str, rounds: int, seed: int) -> dict[str, float]:
    """Pairs per second of ours over those of a plain loop, in turn on the same pairs."""
    rows = work / shape
    make_rows(rows, make_pairs(shape, COMPARED_PAIRS, seed), model)
    table = read_columns(rows, TOKEN_COLUMNS).slice(0, COMPARED_PAIRS)
    ours = scorer_of(model)
    ours.load(torch.device("cpu"))
    theirs = PlainLoop(model)

    ratios = []
    for number in range(rounds + 1):
        own_s, own = _timed(ours, table)
        their_s, plain = _timed(theirs, table)
        difference = float(np.abs(own - plain).max())
        if difference > TOLERANCE * float(np.abs(plain).max()):
            raise RuntimeError(f"the log-probs of {shape} differ by {difference}")
        if number:  # the first one warms up
            ratios.append(their_s / own_s)
    return {
        f"{shape}_ratio": statistics.median(ratios),
        f"{shape}_ratio_low": min(ratios),
        f"{shape}_ratio_high": max(ratios),
    }


def _timed(scorer: Any, table: pa.Table) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    scores = scorer(table)
    return time.perf_counter() - began, scores


class RateLog(logging.Handler):
    """Remembers the pairs per second of the last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Called for what `ScoringProgress` logs."""
        message = record.getMessage()
        if " pairs/s" in message:
            self.rate = float(message.split(": ")[1].split(" pairs/s")[0].replace(",", ""))


def compare_passes(work: Path, model: Path, count: int, seed: int) -> dict[str, float]:
    """The Ray pass against the bare scorer, and two actors against one; after start-up."""
    rows = work / "pass"
    make_rows(rows, make_pairs("chat", count, seed), model)
    rates = RateLog()
    logger = logging.getLogger("madpo_ray.scoring.progress")
    logger.addHandler(rates)
    logger.setLevel(logging.INFO)

    def rate(actors: ActorPool) -> float:
        kept = work / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        notes = BatchNotes(work / "notes")
        options: dict[str, Any] = {"batch_size": 64, "notes": notes, "kept": kept}
        with connected(ClusterConfig(num_workers=1)):
            score_rows(rows, [scorer_of(model)], actors, **options)
        return rates.rate

    threads = torch.get_num_threads()
    bare = scorer_of(model)
    bare.load(torch.device("cpu"))
    table = read_columns(rows, TOKEN_COLUMNS)
    began = time.perf_counter()
    for start in range(0, count, 64):
        bare(table.slice(start, 64))
    bare_rate = count / (time.perf_counter() - began)
    piped = rate(ActorPool(1, 1, float(threads), 0.0))
    one = rate(ActorPool(1, 1, 1.0, 0.0))
    two = rate(ActorPool(2, 2, 1.0, 0.0))
    return {
        "bare_pairs_per_s": bare_rate,
        "pipeline_efficiency": piped / bare_rate,
        "actor_scaling": two / one,
    }


class Moments:
    """When a run's first optimizer step was logged, and when its last pair was scored."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "ray"
        self._is_done = threading.Event()
        self.first_step = 0.0
        self.last_scored = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._is_done.set()
        if not (self.first_step and self.last_scored):
            raise RuntimeError(f"no step, or no score, was seen in {self._folder}")

    def _watch(self) -> None:
        while not self._is_done.wait(0.1):
            with contextlib.suppress(FileNotFoundError):  # the stage ended, and deleted them
                for file in self._folder.glob("train-*/metrics/metrics.jsonl"):
                    if not self.first_step and file.stat().st_size:
                        self.first_step = time.time()
                chunks = self._folder.glob("margins-*/kept/[!.]*.parquet")
                written = [file.stat().st_mtime for file in chunks]
                self.last_scored = max([self.last_scored, *written])


def compare_modes(work: Path, model: Path, count: int, seed: int) -> dict[str, float]:
    """Seconds of an epoch that is scored while it trains, over those of scoring, then training."""
    data = work / "pairs.jsonl"
    found = make_pairs("chat", count, seed)
    data.write_text("".join(json.dumps(pair) + "\n" for pair in found))

    def config(mode: str) -> Config:
        return parse_config(
            {
                "model": {"model_name_or_path": str(model)},
                "data": {"files": [str(data)], "validation_fraction": 0.05, "test_fraction": 0.0},
                "run": {"name": mode, "storage_path": str(work)},
                "cluster": {"num_workers": 1},
                "margins": {"mode": mode},
                "train": {
                    "loss_type": "sigmoid",
                    "learning_rate": 1e-6,
                    "global_batch_size": BATCH_SIZE,
                    "per_device_train_batch_size": BATCH_SIZE,
                    "num_train_epochs": 1,
                    "logging_steps": 1,
                },
            }
        )

    seconds = {}
    for mode, stages in (
        ("stored", (margins.STAGE, train.STAGE)),
        ("stream", (train.STAGE, margins.STAGE)),
    ):
        own = config(mode)
        with connected(own.cluster, actors=own.actors, streams=mode == "stream"):
            pipeline.run_stage(own, pairs.STAGE, say=print)
            if mode == "stream":
                moments = Moments(own.run.folder)
            began = time.time()
            for stage in stages:
                pipeline.run_stage(own, stage, say=print)
                if stage is train.STAGE and mode == "stream":
                    trained = time.time()
            seconds[mode] = time.time() - began
    moments.stop()
    return {
        "stored_s": seconds["stored"],
        "stream_s": seconds["stream"],
        "stream_overhead": seconds["stream"] / seconds["stored"],
        "stream_first_step_s": moments.first_step - began,
        "stream_last_scored_s": moments.last_scored - began,
        "stream_trained_s": trained - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of ours and theirs in turn")
    parser.add_argument("--pairs", type=int, default=2000, help="of the Ray pass")
    parser.add_argument("--epoch", type=int, default=800, help="pairs of the epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["loops", "passes", "modes"])
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    work = Path(tempfile.mkdtemp())
    results: dict[str, float] = {}
    try:
        make_model(work / "model", arguments.seed)
        model = work / "model"
        if arguments.only in (None, "loops"):
            for shape in ("summary", "chat"):
                results |= compare_loops(work, model, shape, arguments.rounds, arguments.seed)
            print(results, flush=True)
        if arguments.only in (None, "passes"):
            results |= compare_passes(work, model, arguments.pairs, arguments.seed)
            print(results, flush=True)
        if arguments.only in (None, "modes"):
            results |= compare_modes(work, model, arguments.epoch, arguments.seed)
    finally:
        shutil.rmtree(work)
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


if __name__ == "__main__":
    main()
