"""Training speed and memory on one GPU, side by side with TRL's DPOTrainer.

A random Llama of 1.1 B parameters in bfloat16, eight pairs per step, ZeRO-1, no gradient
checkpointing. Each measurement is a process of its own: ours, TRL in autocast with its own
defaults, and, if flash-attn is installed, TRL with it. Only steps after the warm-up count: the
first ones on a GPU are slow. The last line is one JSON object.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_training import SHAPES, make_model, make_pairs, make_rows, our_job, step_seconds

SIZE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
PAIRS_PER_STEP = 8
MAX_LENGTH = 4096
# The first steps start kernels for the first time, and the clock of a GPU takes a while to rise.
WARM_UP = 10

Numbers = dict[str, Any]


def measure_ours(work: Path, shape: str, steps: int) -> list[float]:
    from madpo_ray.training.rank import run_rank
    from madpo_ray.training.sites import LocalSite, join_ranks

    join_ranks(0, 1, work / f"store-{os.getpid()}")
    name = f"bare-{os.getpid()}"
    job = our_job(work, shape, steps, 4, name=name, dtype="bfloat16", zero_stage=1)
    batches = {
        "global_batch_size": PAIRS_PER_STEP,
        "per_device_train_batch_size": PAIRS_PER_STEP,
    }
    job = dataclasses.replace(job, settings=job.settings.model_copy(update=batches))
    run_rank(job, LocalSite(job))
    return step_seconds(job, WARM_UP)


def measure_trl(work: Path, shape: str, steps: int, attention: str) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *args: Any, **more: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.monotonic()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.began)

    arguments = DPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=PAIRS_PER_STEP,
        max_steps=steps,
        max_length=MAX_LENGTH,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        work / "model", dtype=torch.float32, attn_implementation=attention
    )
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(json.loads((work / f"{shape}.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds[WARM_UP:]


def child(arguments: argparse.Namespace) -> None:
    """One measurement; prints its numbers as the last line."""
    import torch

    work, shape, steps = Path(arguments.work), arguments.shape, arguments.steps
    if arguments.measure == "ours":
        seconds = measure_ours(work, shape, steps)
    else:
        attention = "flash_attention_2" if arguments.measure == "trl-flash" else "sdpa"
        seconds = measure_trl(work, shape, steps, attention)
    peak = torch.cuda.max_memory_allocated()
    print("\n" + json.dumps({"seconds": seconds, "peak_bytes": peak}))


def measure(work: Path, side: str, shape: str, steps: int) -> Numbers | None:
    """One measurement in a process of its own; None if it ran out of memory."""
    command = [sys.executable, __file__, "--measure", side, "--shape", shape]
    command += ["--work", str(work), "--steps", str(steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0 and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode != 0:
        raise SystemExit(f"measuring {side} on {shape} failed:\n{done.stderr[-4000:]}")
    numbers: Numbers = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def cells(numbers: Numbers | None) -> str:
    if numbers is None:
        return "out of memory | -"
    milliseconds = [1e3 * second for second in numbers["seconds"]]
    spread = f"{min(milliseconds):.0f} to {max(milliseconds):.0f}"
    peak = numbers["peak_bytes"] / 2**30
    return f"{statistics.median(milliseconds):.0f} ({spread}) | {peak:.1f}"


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    for internal in ("--measure", "--shape", "--work"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps has to be above {WARM_UP}, which do not count")
    if arguments.measure:
        child(arguments)
        return

    sides = ["ours", "trl"]
    if importlib.util.find_spec("flash_attn"):
        sides.append("trl-flash")
    result: dict[str, float] = {}
    print("| shape | side | ms per step (range) | peak GiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.seed, **SIZE)
        for shape in arguments.shapes:
            pairs = make_pairs(shape, PAIRS_PER_STEP * arguments.steps, arguments.seed)
            (work / f"{shape}.json").write_text(json.dumps(pairs))
            make_rows(work / shape, pairs, work / "model")
            medians = {}
            for side in sides:
                numbers = measure(work, side, shape, arguments.steps)
                print(f"| {shape} | {side} | {cells(numbers)} |", flush=True)
                if numbers is not None:
                    medians[side] = statistics.median(numbers["seconds"])
            for side in sides[1:]:
                if side in medians and "ours" in medians:
                    result[f"{shape}_{side}_ratio"] = medians[side] / medians["ours"]
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
