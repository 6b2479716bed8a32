"""Peak memory of each rank while a policy is loaded, trained and exported, under ZeRO 2 and 3.

Counts what a phase adds to a process's own memory (RssAnon): weights read from a file are mapped,
and the system can drop such pages. What is freed is given back at once (MALLOC_MMAP_THRESHOLD_), so
that a peak is what is held. Ranks run over gloo on this machine; a random Llama of 219 M
parameters, 0.82 GiB in float32.
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

from benchmark_training import make_model, make_pairs, make_rows, our_job

SIZE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
}
STEPS = 2
# 1.5 times the largest tensor, the embedding. DeepSpeed's defaults would gather this complete
# model, and put all its gradients into one bucket.
BUCKETS: dict[str, Any] = {
    "stage3_max_live_parameters": 37_000_000,
    "reduce_bucket_size": 37_000_000,
}
# Of one file of the export, which rank 0 holds while it writes; the default is 5 GB.
EXPORT_BYTES = 2**27


def own_bytes() -> int:
    """This process's RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


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

    from madpo_ray.models import saving
    from madpo_ray.training.job import PolicyTask
    from madpo_ray.training.rank import run_rank
    from madpo_ray.training.sites import LocalSite, join_ranks

    rank, size, work = arguments.rank, arguments.ranks, Path(arguments.work)
    join_ranks(rank, size, work / f"store-{arguments.stage}")
    job = our_job(
        work,
        "summary",
        STEPS,
        1,
        size,
        name=f"stage-{arguments.stage}",
        export=True,
        zero_stage=arguments.stage,
        **BUCKETS,
    )
    saving.SHARD_BYTES = EXPORT_BYTES
    # Their own memory is not part of a model's.
    import deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    watch = Watch()

    class WatchedTask(PolicyTask):
        def load(self, *given: Any) -> Any:
            module = super().load(*given)
            watch.begin("train")
            return module

    class WatchedSite(LocalSite):
        def report(self, *given: Any) -> None:
            super().report(*given)
            watch.begin("export")

    task = WatchedTask(columns=job.task.columns)
    run_rank(dataclasses.replace(job, task=task), WatchedSite(job))
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, watch.peaks)
    if rank == 0:
        print("\n" + json.dumps(gathered), flush=True)


def measure(work: Path, stage: int, ranks: int) -> list[dict[str, int]]:
    """The peaks of each rank, by phase, in bytes."""
    command = [sys.executable, __file__, "--work", str(work), "--stage", str(stage)]
    command += ["--ranks", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    started = [
        subprocess.Popen(
            [*command, "--rank", str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a rank failed under ZeRO-{stage}")
    peaks: list[dict[str, int]] = json.loads(outputs[0].strip().splitlines()[-1])
    return peaks


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return

    print("| ZeRO | rank | GiB added by loading | training and saving | exporting |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.seed, **SIZE)
        pairs = make_pairs("summary", 8 * STEPS, arguments.seed)
        make_rows(work / "summary", pairs, work / "model")
        for stage in (2, 3):
            for rank, peaks in enumerate(measure(work, stage, arguments.ranks)):
                sizes = [peaks.get(phase, 0) / 2**30 for phase in ("load", "train", "export")]
                shown = " | ".join(f"{size:.2f}" for size in sizes)
                print(f"| {stage} | {rank} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
