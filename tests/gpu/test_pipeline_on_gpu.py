"""The complete pipeline on one GPU, and the same numbers as without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml


def run_pipeline(raw: dict[str, Any], folder: Path, **environment: str) -> Path:
    """Runs all stages in processes of their own; the run's folder."""
    file = folder / f"{raw['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(raw))
    program = "from madpo_ray.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "--config", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder / raw["run"]["name"]


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_float32_pipeline_gives_the_numbers_of_the_cpu(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """Losses and gradient norms of every step, and validation losses, to 1e-3."""
    raw_config["cluster"] = {"num_workers": 1, "use_gpu": False}
    raw_config["model"]["dtype"] = "float32"
    for section in ("sft", "reward", "train"):  # DeepSpeed's default is a bucket of 2 GB
        raw_config[section]["reduce_bucket_size"] = 10**6
    raw_config["run"]["name"] = "cpu"
    cpu = run_pipeline(raw_config, tmp_path, CUDA_VISIBLE_DEVICES="")
    raw_config["cluster"]["use_gpu"] = True
    raw_config["run"]["name"] = "gpu"
    gpu = run_pipeline(raw_config, tmp_path)

    for stage in ("sft", "reward", "train"):
        ours, theirs = metrics(gpu, stage), metrics(cpu, stage)
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            for name in ("loss", "grad_norm", "eval_loss"):
                if name in their:
                    assert our[name] == pytest.approx(their[name], rel=1e-3, abs=1e-3), stage
    assert metrics(gpu, "train")[0]["peak_memory_bytes"] < 2**30  # of the GPU, not the process

    # What was scored, pair by pair.
    for column in ("margin", "ref_chosen_logps", "ref_rejected_logps"):
        ours, theirs = (
            pq.read_table(run / "margins" / "data", columns=[column])[column].to_numpy()
            for run in (gpu, cpu)
        )
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3), column


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_workers_on_ray_give_the_numbers_of_one(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """Each with a GPU of its own, as Ray assigns them."""
    raw_config["model"]["dtype"] = "float32"
    losses = []
    for num_workers in (1, 2):
        raw_config["cluster"] = {"num_workers": num_workers, "use_gpu": True}
        raw_config["run"]["name"] = f"workers-{num_workers}"
        run = run_pipeline(raw_config, tmp_path)
        losses.append([line["loss"] for line in metrics(run, "train") if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_worker_and_scoring_actor_share_a_gpu(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """With `margins.mode: stream`; the losses are those of stored margins."""
    raw_config["model"]["dtype"] = "float32"
    losses = []
    for mode in ("stored", "stream"):
        raw_config["cluster"] = {"num_workers": 1, "use_gpu": True, "gpus_per_worker": 0.6}
        raw_config["scoring"] = raw_config.get("scoring", {}) | {"gpus_per_actor": 0.4}
        raw_config["margins"] = raw_config.get("margins", {}) | {"mode": mode}
        raw_config["run"]["name"] = mode
        run = run_pipeline(raw_config, tmp_path)
        losses.append([line["loss"] for line in metrics(run, "train") if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 2},
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 2, "use_peft": True, "lora_r": 4},
    ],
    ids=["zero2", "zero3", "lora"],
)
def test_bfloat16_pipeline(
    changes: dict[str, Any], raw_config: dict[str, Any], tmp_path: Path
) -> None:
    raw_config["cluster"] = {"num_workers": 1, "use_gpu": True}
    raw_config["train"] |= changes
    run = run_pipeline(raw_config, tmp_path)
    losses = [line["loss"] for line in metrics(run, "train") if "loss" in line]
    assert len(losses) == 5
    assert all(0 < loss < 10 for loss in losses)
    assert (run / "evaluate" / "evaluation.json").exists()
