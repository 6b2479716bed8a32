"""Peak memory of each rank while a policy is loaded, trained and exported, under ZeRO-2 and ZeRO-3.

Counts what a phase adds to a process's own memory (RssAnon): weights read from a file are mapped, and the system can
drop such pages. What is freed is given back at once (MALLOC_MMAP_THRESHOLD_), so that a peak is what is held. Ranks run
over gloo on this machine; a random Llama of 219 M parameters, 0.82 GiB in float32.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmark_training import make_model, make_pairs, make_source, our_job

SIZE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 12}
STEPS = 2
# The largest tensor, the embedding, and half as much again: DeepSpeed's defaults would gather this whole model, and put
# all its gradients into one bucket.
BUCKETS = {"stage3_max_live_parameters": 37_000_000, "reduce_bucket_size": 37_000_000}
# Of one file of the export, which rank 0 holds while it writes; otherwise some gigabytes.
EXPORT_BYTES = 2**27


def own_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch:
    """The largest `own_bytes` of each phase, above what the process had when the phase began."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.begin("load")
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, phase: str) -> None:
        self._now = (phase, own_bytes())

    def _watch(self) -> None:
        while True:
            phase, before = self._now
            self.peaks[phase] = max(self.peaks.get(phase, 0), own_bytes() - before)
            time.sleep(0.005)


def rank_main(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    from madpo_ray import models
    from madpo_ray.train import PolicyTask
    from madpo_ray.worker import Local, join_ranks, train_rank

    rank, size, work = arguments.rank, arguments.ranks, Path(arguments.work)
    join_ranks(rank, size, work / f"store-{arguments.stage}")
    name = f"stage-{arguments.stage}"
    job = our_job(work, "summary", STEPS, 1, size, name=name, export=True, zero_stage=arguments.stage, **BUCKETS)
    models.SHARD_BYTES = EXPORT_BYTES
    import deepspeed  # noqa: F401 (its own memory, and transformers', is no part of a model's)
    import transformers.models.llama.modeling_llama  # noqa: F401

    watch = Watch()

    class Task(PolicyTask):
        def load(self, *given: Any) -> Any:
            module = super().load(*given)
            watch.begin("train")
            return module

    class Site(Local):
        def report(self, *given: Any) -> None:
            super().report(*given)
            watch.begin("export")

    train_rank(dataclasses.replace(job, task=Task()), Site(job))
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, watch.peaks)
    if rank == 0:
        print("\n" + json.dumps(gathered), flush=True)


def measure(work: Path, stage: int, ranks: int) -> list[dict[str, int]]:
    command = [sys.executable, __file__, "--work", str(work), "--stage", str(stage), "--ranks", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    started = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a rank failed under ZeRO-{stage}")
    peaks: list[dict[str, int]] = json.loads(said[0].strip().splitlines()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return
    print("| ZeRO | rank | GiB more while loading | training and saving | exporting |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.seed, **SIZE)
        make_source(work / "summary", make_pairs("summary", 8 * STEPS, arguments.seed), work / "model")
        for stage in (2, 3):
            for rank, peaks in enumerate(measure(work, stage, arguments.ranks)):
                shown = " | ".join(f"{peaks.get(phase, 0) / 2**30:.2f}" for phase in ("load", "train", "export"))
                print(f"| {stage} | {rank} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
