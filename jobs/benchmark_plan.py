"""Memory that `madpo-ray plan` computes, next to measured peaks of trainings.

Random Llamas of three sizes, all weights and LoRA, ZeRO 0, 2 and 3, float32, two ranks over gloo on
this machine. Counts what a rank adds to its resident memory (VmRSS) from before the model is loaded
to its peak. What is freed is given back at once (MALLOC_MMAP_THRESHOLD_). DeepSpeed's buckets are
smaller than the models, as they are for large ones. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmark_training import make_model, make_rows, our_job

SIZES = {
    "93 M": {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 11,
        "num_attention_heads": 10,
    },
    "219 M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
    },
    "434 M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 29,
        "num_attention_heads": 16,
    },
}
RANKS = 2
PAIRS_PER_FORWARD = 2
PROMPT_TOKENS = 350
RESPONSE_TOKENS = 40
STEPS = 3
MICRO_BATCHES = 2  # of a rank in a step: gradients of the first are there in the second
PAIRS_PER_STEP = MICRO_BATCHES * RANKS * PAIRS_PER_FORWARD
STAGES = (0, 2, 3)


def settings_of(stage: int, use_peft: bool) -> dict[str, Any]:
    bucket = 500_000 if use_peft else 13_000_000
    return {
        "zero_stage": stage,
        "use_peft": use_peft,
        "reduce_bucket_size": bucket,
        "stage3_max_live_parameters": 13_000_000,
    }


def resident_bytes() -> int:
    """This process's VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


class Watch:
    """The largest resident memory since the start, above that of the start."""

    def __init__(self) -> None:
        self.peak = 0
        self._before = resident_bytes()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes() - self._before)
            time.sleep(0.002)


def job_of(work: Path, stage: int, use_peft: bool) -> Any:
    job = our_job(
        work,
        "summary",
        STEPS,
        1,
        name=f"zero-{stage}-{use_peft}",
        **settings_of(stage, use_peft),
    )
    batches = {
        "global_batch_size": PAIRS_PER_STEP,
        "per_device_train_batch_size": PAIRS_PER_FORWARD,
    }
    return dataclasses.replace(job, settings=job.settings.model_copy(update=batches))


def rank_main(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from madpo_ray.training.rank import run_rank
    from madpo_ray.training.sites import LocalSite, join_ranks

    work = Path(arguments.work)
    name = f"store-{arguments.stage}-{arguments.use_peft}"
    join_ranks(arguments.rank, RANKS, work / name)
    job = job_of(work, arguments.stage, arguments.use_peft)
    # The libraries' own memory is not part of a model's.
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.randn(512, 512) @ torch.randn(512, 512)

    watch = Watch()
    run_rank(job, LocalSite(job))
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, watch.peak)
    dist.destroy_process_group()  # its threads may not outlive the interpreter
    if arguments.rank == 0:
        print("\n" + json.dumps(gathered), flush=True)


def measure(work: Path, stage: int, use_peft: bool) -> int:
    """The largest rank's peak, in bytes."""
    command = [sys.executable, __file__, "--work", str(work), "--stage", str(stage)]
    command += ["--use-peft"] if use_peft else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    started = [
        subprocess.Popen(
            [*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a rank failed under ZeRO-{stage}")
    peaks: list[int] = json.loads(outputs[0].strip().splitlines()[-1])
    return max(peaks)


def planned(work: Path, stage: int, use_peft: bool) -> int:
    from madpo_ray.models.attention import load_architecture
    from madpo_ray.sizing.footprint import Shape, measure_footprint
    from madpo_ray.sizing.memory import rank_memory

    job = job_of(work, stage, use_peft)
    footprint = measure_footprint(
        load_architecture(work / "model"),
        job.model,
        Shape(PAIRS_PER_FORWARD, PROMPT_TOKENS, RESPONSE_TOKENS),
        task_type="CAUSAL_LM",
        settings=job.settings,
        packed=True,
        on_gpu=False,
    )
    memory = rank_memory(
        footprint, job.settings, dtype="float32", num_ranks=RANKS, num_micro_batches=MICRO_BATCHES
    )
    return memory.peak


def make_data(work: Path, seed: int, size: str) -> None:
    make_model(work / "model", seed, **SIZES[size])
    rng = random.Random(seed)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, 1000)}" for _ in range(count))

    pairs = [
        {
            "prompt": text(PROMPT_TOKENS),
            "chosen": " " + text(RESPONSE_TOKENS),
            "rejected": " " + text(RESPONSE_TOKENS),
        }
        for _ in range(PAIRS_PER_STEP * STEPS)
    ]
    make_rows(work / "summary", pairs, work / "model")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--use-peft", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return

    ratios = []
    print("| model | trained | ZeRO | planned GiB | measured GiB | planned / measured |")
    print("|---|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            make_data(work, arguments.seed, size)
            for use_peft in (False, True):
                for stage in STAGES:
                    plan = planned(work, stage, use_peft)
                    peak = measure(work, stage, use_peft)
                    ratios.append(plan / peak)
                    cells = (
                        size,
                        "LoRA" if use_peft else "all",
                        str(stage),
                        f"{plan / 2**30:.2f}",
                        f"{peak / 2**30:.2f}",
                        f"{plan / peak:.2f}",
                    )
                    print(f"| {' | '.join(cells)} |", flush=True)
    print(json.dumps({"lowest": min(ratios), "highest": max(ratios)}))


if __name__ == "__main__":
    main()
