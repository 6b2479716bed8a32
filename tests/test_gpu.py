"""What only a GPU can show: the whole pipeline on one, and the same numbers as without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from madpo_ray.config import ModelConfig
from madpo_ray.data.batching import collate
from madpo_ray.models.attention import _has_flash_kernel, packed_attention
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.models.reading import find_reading
from support.forwards import PAIRS, separate_logps
from support.models import make_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# Largest difference of a response's log-prob, in nats. TF32 is off.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1.0}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text", "gpt2"])
def test_rows_are_packed_and_give_the_models_log_probs(model_type: str, dtype: torch.dtype) -> None:
    model = make_model(model_type)
    with torch.no_grad():
        expected = separate_logps(model)
        module = ResponseLogps(model.to(CUDA, dtype))
        settings = ModelConfig(model_name_or_path="x")
        reading = find_reading(module, CUDA, settings)
        assert reading.packed
        logps = module(collate(PAIRS, packed=True).to(CUDA))["logps"]
    torch.testing.assert_close(logps.cpu(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "key_heads", "channels"), [(4, 4, 64), (8, 2, 128)])
def test_flash_kernel_equals_segments(
    heads: int, key_heads: int, channels: int, window: int | None
) -> None:
    """Outputs and gradients in bfloat16, against float32."""
    batch = collate(PAIRS, packed=True).to(CUDA)
    row = batch.packed_row
    shapes = [
        (1, count, batch.input_ids.shape[1], channels) for count in (heads, key_heads, key_heads)
    ]
    exact = [torch.randn(*shape, device=CUDA, requires_grad=True) for shape in shapes]
    rounded = [states.detach().bfloat16().requires_grad_() for states in exact]
    assert _has_flash_kernel(rounded[0], rounded[2])
    assert not _has_flash_kernel(exact[0], exact[2])

    results = []
    for states in (rounded, exact):
        output, _ = packed_attention(None, *states, None, packed_row=row, sliding_window=window)
        grads = torch.autograd.grad(output.float().square().sum(), states)
        results.append([output, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


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
