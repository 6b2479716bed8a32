"""Training speed and memory side by side with TRL's DPOTrainer, in one call on one machine.

Each measurement is a process of its own, ours and TRL's in turn, so that peaks of memory are whole processes' and
noise falls on both. Same random Llama, pairs, threads, dtype and pairs a step; gradient checkpointing off; TRL with
`precompute_ref_log_probs` and its own defaults otherwise. Needs `pip install 'madpo-ray[benchmark]'`.
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
from typing import Any

# Tokens of prompts and of responses, (low, high).
SHAPES = {"summary": ((300, 400), (20, 60)), "chat": ((100, 150), (80, 150))}
VOCABULARY = 32_000
PAIRS_PER_STEP = 8
# Steps of a measurement that do not count: on Ray, other processes are still starting beside the first ones.
WARM_UP = 2


def make_model(folder: Path, seed: int, **size: int) -> None:
    """A random Llama, of 39 M parameters unless sized otherwise, with a tokenizer of one word a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **{"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6, **size},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)


def make_pairs(shape: str, count: int, seed: int) -> list[dict[str, str]]:
    """Random texts of the shape's lengths."""
    rng = random.Random(seed)
    prompts, responses = SHAPES[shape]

    def text(bounds: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(rng.randint(*bounds)))

    return [
        {"prompt": text(prompts), "chosen": " " + text(responses), "rejected": " " + text(responses)}
        for _ in range(count)
    ]


def make_source(folder: Path, pairs: list[dict[str, str]], model: Path) -> None:
    """The pairs as an artifact's rows. Margins and reference log-probs only have to be numbers: speed is measured."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from madpo_ray.formats import tokenize_pair

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        {
            "pair_id": str(i),
            "split": split,
            **tokenize_pair(pair, tokenizer, 2048),
            "margin": (i % 7) - 2.0,
            "ref_chosen_logps": -500.0,
            "ref_rejected_logps": -500.0,
        }
        for i, pair in enumerate(pairs)
        for split in (["train", "validation"] if i < PAIRS_PER_STEP else ["train"])
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-000000.parquet")


def our_job(
    work: Path,
    shape: str,
    steps: int,
    threads: int,
    workers: int = 1,
    *,
    name: str,
    export: bool = False,
    **settings: Any,
) -> Any:
    """A training as both sides measure it; `settings` are more keys of section train."""
    from madpo_ray.config_file import parse_config
    from madpo_ray.train import PolicyTask
    from madpo_ray.worker import TrainingJob

    config = parse_config(
        {
            "model": {"model_name_or_path": str(work / "model")},
            "data": {"files": [str(work / "none.jsonl")], "max_length": 2048},
            "run": {"storage_path": str(work), "name": f"{shape}-{name}"},
            "cluster": {"num_workers": workers, "cpus_per_worker": threads},
            "train": {
                "learning_rate": 1e-6,
                "global_batch_size": PAIRS_PER_STEP,
                "per_device_train_batch_size": PAIRS_PER_STEP // workers,
                "max_steps": steps,
                "logging_steps": 1,
                **settings,
            },
        }
    )
    return TrainingJob(
        task=PolicyTask(),
        config=config,
        base=work / "model",
        source=work / shape,
        output=work / f"{shape}-{name}-{os.getpid()}",
        experiment=name,
        export=export,
    )


def step_seconds(job: Any) -> list[float]:
    """Seconds of each step behind those that warm up."""
    from madpo_ray.metrics import read_metrics

    lines = [line for line in read_metrics(job.metrics / "metrics.jsonl") if "pairs_per_second" in line]
    return [PAIRS_PER_STEP / line["pairs_per_second"] for line in lines[WARM_UP:]]


def measure_ours(work: Path, shape: str, steps: int, threads: int) -> dict[str, Any]:
    """The loop and the engine of a training in this process, without Ray."""
    from madpo_ray.metrics import read_metrics
    from madpo_ray.worker import Local, join_ranks, train_rank

    join_ranks(0, 1, work / f"store-{os.getpid()}")
    job = our_job(work, shape, steps, threads, name=f"bare-{os.getpid()}")
    train_rank(job, Local(job))
    utilisation = [line["mfu"] for line in read_metrics(job.metrics / "metrics.jsonl") if "mfu" in line]
    return {"seconds": step_seconds(job), "mfu": statistics.median(utilisation[WARM_UP:])}


def measure_trl(work: Path, shape: str, steps: int, threads: int) -> dict[str, Any]:
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
        per_device_train_batch_size=PAIRS_PER_STEP,
        max_steps=steps,
        max_length=2048,
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


def measure_on_ray(work: Path, shape: str, steps: int, threads: int, workers: int) -> dict[str, Any]:
    """The whole TorchTrainer, fed by Ray Data."""
    import ray

    from madpo_ray.launch import train_on_ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    job = our_job(work, shape, steps, threads, workers, name=f"ray{workers}-{os.getpid()}")
    train_on_ray(job)
    ray.shutdown()
    return {"seconds": step_seconds(job)}


def child(arguments: argparse.Namespace) -> None:
    """One measurement; prints its numbers as the last line."""
    work, shape, steps = Path(arguments.work), arguments.shape, arguments.steps
    if arguments.measure == "ours":
        numbers = measure_ours(work, shape, steps, arguments.threads)
    elif arguments.measure == "trl":
        numbers = measure_trl(work, shape, steps, arguments.threads)
    else:
        workers = int(arguments.measure.removeprefix("ray"))
        numbers = measure_on_ray(work, shape, steps, arguments.threads // workers, workers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps({**numbers, "peak_bytes": peak}))


def measure(work: Path, what: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, "--shape", shape, "--work", str(work)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"measuring {what} on {shape} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{shape} {what}: {statistics.median(numbers['seconds']):.2f} s a step", flush=True)
    return numbers


def in_turn(work: Path, sides: tuple[str, ...], shape: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each side's seconds, pooled over rounds that take turns, and its largest peak."""
    pooled: dict[str, dict[str, Any]] = {side: {"seconds": [], "peak_bytes": 0, "mfu": []} for side in sides}
    for _ in range(arguments.rounds):
        for side in sides:
            numbers = measure(work, side, shape, arguments)
            pooled[side]["seconds"] += numbers["seconds"]
            pooled[side]["peak_bytes"] = max(pooled[side]["peak_bytes"], numbers["peak_bytes"])
            pooled[side]["mfu"] += [numbers["mfu"]] if "mfu" in numbers else []
    return pooled


def rows_of(shape: str, pooled: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line of the table for each side; on Ray the model is in other processes, whose memory is not shown."""
    for side, numbers in pooled.items():
        seconds = sorted(numbers["seconds"])
        median, spread = statistics.median(seconds), f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
        yield (
            f"| {shape} | {side} | {PAIRS_PER_STEP / median:.2f} | {median:.2f} ({spread}) "
            f"| {'-' if side.startswith('ray') else format(numbers['peak_bytes'] / 2**30, '.2f')} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=6, help="optimizer steps of a measurement; the first two do not count"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        child(arguments)
        return

    result: dict[str, float] = {}
    table = ["| shape | side | pairs/s | seconds a step (range) | peak GiB |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.seed)
        for shape in SHAPES:
            pairs = make_pairs(shape, PAIRS_PER_STEP * arguments.steps, arguments.seed)
            (work / f"{shape}.json").write_text(json.dumps(pairs))
            make_source(work / shape, pairs, work / "model")
            pooled = in_turn(work, ("ours", "trl"), shape, arguments)
            table += rows_of(shape, pooled)
            ours, trl = pooled["ours"], pooled["trl"]
            result[f"{shape}_ratio"] = statistics.median(trl["seconds"]) / statistics.median(ours["seconds"])
            result[f"{shape}_memory_ratio"] = ours["peak_bytes"] / trl["peak_bytes"]
            result["mfu"] = min(result.get("mfu", 1.0), statistics.median(ours["mfu"]))
        pooled = in_turn(work, ("ours", "ray1", "ray2"), "chat", arguments)
        table += rows_of("chat, again", pooled)
        medians = {side: statistics.median(numbers["seconds"]) for side, numbers in pooled.items()}
        result["trainer_overhead"] = medians["ray1"] / medians["ours"] - 1
    print("\n".join(table))
    print(f"two workers of one thread take {medians['ray2'] / medians['ray1']:.2f} of one worker's step with two")
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
