"""Training speed and memory side by side with TRL's DPOTrainer, in one call on one machine.

Each measurement is a process of its own, ours and TRL's in turn, so that a peak of memory is that
of one side and noise affects both. Same random Llama, pairs, threads, dtype (but for ours in
bfloat16) and pairs per step; gradient checkpointing off; TRL with `precompute_ref_log_probs` and
its own defaults otherwise.
Needs TRL, which `make setup` installs.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Shape(NamedTuple):
    """Tokens (low, high) of prompts and of responses, and pairs per step."""

    prompts: tuple[int, int]
    responses: tuple[int, int]
    pairs_per_step: int


SHAPES = {
    "summary": Shape((300, 400), (20, 60), 8),
    "chat": Shape((100, 150), (80, 150), 8),
    "long": Shape((1500, 2000), (200, 400), 2),
}
VOCABULARY = 32_000
MAX_LENGTH = 4096
VALIDATION_PAIRS = 2
# Steps of a measurement that do not count.
WARM_UP = 2
# Steps of measurements on Ray, and of ours beside them: its processes are busy for the first ten
# seconds.
RAY_STEPS = 20

Numbers = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]


def make_model(folder: Path, seed: int, **size: int) -> None:
    """A random Llama, of 39 M parameters by default, with a tokenizer of one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        **size,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)

    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocabulary |= {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def make_pairs(shape: str, count: int, seed: int) -> list[dict[str, str]]:
    """Random texts of the shape's lengths."""
    rng = random.Random(seed)
    prompts, responses, _ = SHAPES[shape]

    def text(bounds: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(rng.randint(*bounds)))

    return [
        {
            "prompt": text(prompts),
            "chosen": " " + text(responses),
            "rejected": " " + text(responses),
        }
        for _ in range(count)
    ]


def make_rows(folder: Path, pairs: list[dict[str, str]], model: Path) -> None:
    """The pairs as an artifact's rows.

    Margins and reference log-probs only have to be numbers: speed is measured.
    """
    import pyarrow as pa
    from transformers import AutoTokenizer

    from madpo_ray.artifacts.tables import write_table
    from madpo_ray.data.formats import Pair
    from madpo_ray.data.tokens import tokenize_pair

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for i, pair in enumerate(pairs):
        row = {
            "pair_id": str(i),
            **tokenize_pair(
                Pair(pair["prompt"], pair["chosen"], pair["rejected"]), tokenizer, MAX_LENGTH
            ).as_columns(),
            "margin": (i % 7) - 2.0,
            "ref_chosen_logps": -500.0,
            "ref_rejected_logps": -500.0,
        }
        rows.append({**row, "split": "train"})
        if i < VALIDATION_PAIRS:
            rows.append({**row, "split": "validation"})
    write_table(pa.Table.from_pylist(rows), folder)


def our_job(
    work: Path,
    shape: str,
    steps: int,
    threads: int,
    workers: int = 1,
    *,
    name: str,
    export: bool = False,
    dtype: Dtype = "float32",
    **settings: Any,
) -> Any:
    """A training as both sides measure it; `settings` are further keys of section train."""
    from madpo_ray.columns import MARGIN, REF_LOGPS
    from madpo_ray.config import ModelConfig, PolicyConfig
    from madpo_ray.training.job import PolicyTask, TrainingJob

    training = PolicyConfig(
        learning_rate=1e-6,
        global_batch_size=SHAPES[shape].pairs_per_step,
        per_device_train_batch_size=SHAPES[shape].pairs_per_step // workers,
        max_steps=steps,
        logging_steps=1,
        **settings,
    )
    return TrainingJob(
        stage=shape,
        fingerprint="benchmark",
        trial=name,
        task=PolicyTask(columns=(MARGIN, *REF_LOGPS)),
        settings=training,
        model=ModelConfig(model_name_or_path=str(work / "model"), dtype=dtype),
        seed=0,
        num_threads=threads,
        base_folder=work / "model",
        rows=work / shape,
        output=work / f"{shape}-{name}-{os.getpid()}",
        storage=work / "ray",
        export=export,
    )


def step_seconds(job: Any, warm_up: int = WARM_UP) -> list[float]:
    """Seconds of each step after the warm-up."""
    from madpo_ray.training.metrics import read_metrics

    lines = read_metrics(job.metrics / "metrics.jsonl")
    rates = [line["pairs_per_second"] for line in lines if "pairs_per_second" in line]
    return [job.settings.global_batch_size / rate for rate in rates[warm_up:]]


def measure_ours(work: Path, shape: str, steps: int, threads: int, dtype: Dtype) -> Numbers:
    """Loop and engine of a training in this process, without Ray."""
    from madpo_ray.training.metrics import read_metrics
    from madpo_ray.training.rank import run_rank
    from madpo_ray.training.sites import LocalSite, join_ranks

    join_ranks(0, 1, work / f"store-{os.getpid()}")
    job = our_job(work, shape, steps, threads, name=f"bare-{os.getpid()}", dtype=dtype)
    run_rank(job, LocalSite(job))
    lines = read_metrics(job.metrics / "metrics.jsonl")
    utilisation = [line["mfu"] for line in lines if "mfu" in line]
    return {"seconds": step_seconds(job), "mfu": statistics.median(utilisation[WARM_UP:])}


def measure_trl(work: Path, shape: str, steps: int, threads: int) -> Numbers:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(threads)
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            seconds.append(time.monotonic() - self.began)

    arguments = DPOConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=SHAPES[shape].pairs_per_step,
        max_steps=steps,
        max_length=MAX_LENGTH,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(json.loads((work / f"{shape}.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        callbacks=[Clock()],
    )
    trainer.train()
    return {"seconds": seconds[WARM_UP:]}


def measure_on_ray(work: Path, shape: str, steps: int, threads: int, workers: int) -> Numbers:
    """The complete TorchTrainer, fed by Ray Data."""
    import ray

    from madpo_ray.cluster.connection import LOCAL_EXTRA_CPUS
    from madpo_ray.config import ClusterConfig
    from madpo_ray.training.trainer import train_on_ray

    quiet: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    # As many as a local Ray of `madpo-ray` has: for each CPU Ray starts a process that waits.
    ray.init("local", num_cpus=(os.cpu_count() or 1) + LOCAL_EXTRA_CPUS, **quiet)
    name = f"ray{workers}-{os.getpid()}"
    job = our_job(work, shape, steps, threads, workers, name=name)
    train_on_ray(job, ClusterConfig(num_workers=workers, cpus_per_worker=threads))
    ray.shutdown()
    return {"seconds": step_seconds(job)}


def child(arguments: argparse.Namespace) -> None:
    """One measurement; prints its numbers as the last line."""
    work, shape, steps = Path(arguments.work), arguments.shape, arguments.steps
    if arguments.measure in ("ours", "ours-bfloat16"):
        dtype: Dtype = "float32" if arguments.measure == "ours" else "bfloat16"
        numbers = measure_ours(work, shape, steps, arguments.threads, dtype)
    elif arguments.measure == "trl":
        numbers = measure_trl(work, shape, steps, arguments.threads)
    else:
        workers = int(arguments.measure.removeprefix("ray"))
        threads = arguments.threads // workers
        numbers = measure_on_ray(work, shape, steps, threads, workers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps({**numbers, "peak_bytes": peak}))


def measure(
    work: Path, side: str, shape: str, steps: int, arguments: argparse.Namespace
) -> Numbers:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", side, "--shape", shape]
    command += ["--work", str(work), "--steps", str(steps)]
    command += ["--threads", str(arguments.threads)]
    threads = str(arguments.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        output = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        raise SystemExit(f"measuring {side} on {shape} failed:\n{output}")
    numbers: Numbers = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{shape} {side}: {statistics.median(numbers['seconds']):.2f} s per step", flush=True)
    return numbers


def measure_in_turn(
    work: Path, sides: tuple[str, ...], shape: str, steps: int, arguments: argparse.Namespace
) -> dict[str, Numbers]:
    """Each side's seconds over rounds that take turns, and its largest peak."""
    pooled: dict[str, Numbers] = {
        side: {"seconds": [], "peak_bytes": 0, "mfu": []} for side in sides
    }
    for _ in range(arguments.rounds):
        for side in sides:
            numbers = measure(work, side, shape, steps, arguments)
            total = pooled[side]
            total["seconds"] += numbers["seconds"]
            total["peak_bytes"] = max(total["peak_bytes"], numbers["peak_bytes"])
            if "mfu" in numbers:
                total["mfu"].append(numbers["mfu"])
    return pooled


def table_rows(title: str, pooled: dict[str, Numbers], shape: str | None = None) -> Iterator[str]:
    """One row per side. On Ray the model is in other processes, whose memory is not shown."""
    for side, numbers in pooled.items():
        seconds = sorted(numbers["seconds"])
        median = statistics.median(seconds)
        spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
        peak = "-" if side.startswith("ray") else f"{numbers['peak_bytes'] / 2**30:.2f}"
        rate = SHAPES[shape or title].pairs_per_step / median
        yield f"| {title} | {side} | {rate:.2f} | {median:.2f} ({spread}) | {peak} |"


def compare(shape: str, pooled: dict[str, Numbers]) -> dict[str, float]:
    """Of ours: times TRL's pairs/s, share of its memory, model FLOP utilisation, and what bfloat16
    brings.
    """
    ours, trl = pooled["ours"], pooled["trl"]
    seconds = {side: statistics.median(numbers["seconds"]) for side, numbers in pooled.items()}
    return {
        f"{shape}_ratio": seconds["trl"] / seconds["ours"],
        f"{shape}_bfloat16_speedup": seconds["ours"] / seconds["ours-bfloat16"],
        f"{shape}_memory_ratio": ours["peak_bytes"] / trl["peak_bytes"],
        f"{shape}_mfu": statistics.median(ours["mfu"]),
    }


def compare_with_ray(pooled: dict[str, Numbers]) -> dict[str, float]:
    """What the TorchTrainer adds to a step, and two workers of one thread against one of two."""
    seconds = {side: statistics.median(numbers["seconds"]) for side, numbers in pooled.items()}
    return {
        "trainer_overhead": seconds["ray1"] / seconds["ours"] - 1,
        "two_workers_step_ratio": seconds["ray2"] / seconds["ray1"],
    }


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    steps = "optimizer steps per measurement; the first two do not count"
    parser.add_argument("--steps", type=int, default=6, help=steps)
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--only",
        choices=("trl", "ray"),
        help="the comparison with TRL, or that of the bare loop with the TorchTrainer (shape chat)",
    )
    for internal in ("--measure", "--shape", "--work"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        child(arguments)
        return

    result: dict[str, float] = {}
    table = [
        "| shape | side | pairs/s | seconds per step (range) | peak GiB |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.seed)
        for shape in arguments.shapes:
            steps = arguments.steps
            pairs_per_step = SHAPES[shape].pairs_per_step
            pairs = make_pairs(shape, pairs_per_step * max(steps, RAY_STEPS), arguments.seed)
            trls = pairs[: pairs_per_step * steps]  # it scores all of them with the reference
            (work / f"{shape}.json").write_text(json.dumps(trls))
            make_rows(work / shape, pairs, work / "model")
            if arguments.only != "ray":
                sides = ("ours", "ours-bfloat16", "trl")
                pooled = measure_in_turn(work, sides, shape, steps, arguments)
                table += table_rows(shape, pooled)
                result |= compare(shape, pooled)
            if shape == "chat" and arguments.only != "trl":
                sides = ("ours", "ray1", "ray2")
                pooled = measure_in_turn(work, sides, shape, max(steps, RAY_STEPS), arguments)
                table += table_rows("chat, with Ray", pooled, shape)
                result |= compare_with_ray(pooled)
    print("\n".join(table))
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
