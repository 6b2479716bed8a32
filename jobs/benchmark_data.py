"""Data at size: how fast stage pairs is, and how micro-batches reach the ranks of a training.

Stage pairs reads, checks, tokenises and writes one JSON Lines file of conversations, and TRL
prepares the same file for its DPOTrainer; both with their start of processes, on two workers.

The feed has random tokens, a Ray of its own with an object store of 500 MB, and a TorchTrainer
whose workers order the pairs, read and decode as those of a training do, without a model: as fast
as they can, then a micro-batch a second, while the cores that Ray's coordinator keeps busy are
counted (`feed_idle_cores`). Memory is the largest PSS (a shared page is counted in parts) of the
driver, a rank and the actor that reads.
Scoring reads short pairs with a tiny model and two actors: what its processes hold is measured, for
30,000 pairs and for all. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from madpo_ray.cluster.connection import LOCAL_EXTRA_CPUS
from madpo_ray.columns import LENGTHS, MARGIN, PAIR_ID, REF_LOGPS, SPLIT, TOKEN_COLUMNS, TRAIN
from madpo_ray.data.micro_batches import decode_micro_batch, open_tokens
from madpo_ray.data.order import Order, OrderSpec
from madpo_ray.passes import BatchNotes, ordered_execution
from madpo_ray.training.feed import cut_into_chunks, micro_batch_dataset
from madpo_ray.training.trainer import RaySite

ROWS_PER_FILE = 50_000
# Tokens, (low, high): 350 on average, and few enough for a million pairs to be scored in minutes.
Sizes = dict[str, tuple[int, int]]
SIZES: Sizes = {"prompt_ids": (100, 200), "chosen_ids": (50, 150), "rejected_ids": (50, 150)}
SHORT: Sizes = {"prompt_ids": (2, 6), "chosen_ids": (2, 6), "rejected_ids": (2, 6)}
OBJECT_STORE_BYTES = 500 * 10**6
VOCABULARY = 32_000
READER = "_ChunkReader"  # in the names of actors' processes
COORDINATOR = "SplitCoordinator"
SCORER = "ScoringActor"
FEW_PAIRS = 30_000


def write_rows(
    folder: Path, count: int, sizes: Sizes = SIZES, vocabulary: int = VOCABULARY
) -> None:
    """Random pairs, as stage margins writes them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for start in range(0, count, ROWS_PER_FILE):
        num_rows = min(ROWS_PER_FILE, count - start)
        table = {
            PAIR_ID: pa.array([f"{i:016x}" for i in range(start, start + num_rows)]),
            SPLIT: pa.array([TRAIN] * num_rows),
            MARGIN: pa.array(rng.normal(1, 3, num_rows)),
        }
        for name in TOKEN_COLUMNS:
            lengths = rng.integers(*sizes[name], num_rows, endpoint=True)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            tokens = rng.integers(0, vocabulary, offsets[-1], dtype=np.int32)
            table[name] = pa.ListArray.from_arrays(offsets, tokens)
            table[LENGTHS[name]] = pa.array(lengths.astype(np.int32))
        pq.write_table(pa.table(table), folder / f"part-{start // ROWS_PER_FILE:06}.parquet")


def make_conversations(folder: Path, count: int) -> None:
    """A tiny model with a tokenizer of its own, and a file of pairs of 90 to 200 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(1000, 1000) for _ in range(30)], trainer)
    template = Path(__file__).parent / "configs" / "chatml.jinja"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        chat_template=template.read_text(),
    ).save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    architecture = LlamaConfig(vocab_size=8000, num_hidden_layers=1, **sizes)
    LlamaForCausalLM(architecture).save_pretrained(folder / "model")

    with (folder / "pairs.jsonl").open("w") as stream:
        for _ in range(count):
            pair = {
                name: [{"role": role, "content": text(*size)}]
                for name, role, size in (
                    ("prompt", "user", (25, 50)),
                    ("chosen", "assistant", (25, 70)),
                    ("rejected", "assistant", (25, 70)),
                )
            }
            stream.write(json.dumps(pair) + "\n")


def measure_pairs(folder: Path, count: int, workers: int) -> dict[str, float]:
    from madpo_ray import pipeline
    from madpo_ray.config import parse_config
    from madpo_ray.stages import pairs

    folder.mkdir()
    make_conversations(folder, count)
    config = parse_config(
        {
            "model": {"model_name_or_path": str(folder / "model")},
            "data": {"files": [str(folder / "pairs.jsonl")], "max_length": 512},
            "run": {"name": "run", "storage_path": str(folder)},
            "cluster": {"num_workers": workers},
        }
    )
    began = time.monotonic()
    pipeline.run_stage(config, pairs.STAGE, say=print)
    ours = time.monotonic() - began

    command = [sys.executable, __file__, "--prepare-with-trl", str(folder)]
    done = subprocess.run(
        [*command, "--workers", str(workers)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"TRL failed:\n{done.stderr[-4000:]}")
    theirs = float(done.stdout.strip().splitlines()[-1])
    return {
        "pairs_per_s": count / ours,
        "pairs_per_s_of_trl": count / theirs,
        "pairs_ratio": theirs / ours,
    }


def prepare_with_trl(folder: Path, workers: int) -> None:
    """Prints the seconds that TRL needs to read and prepare the pairs."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        max_length=512,
        dataset_num_proc=workers,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    began = time.monotonic()
    file = str(folder / "pairs.jsonl")
    pairs = load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "cache"))
    DPOTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    print(time.monotonic() - began)


def in_a_process(function: Callable[..., Any], *given: Any) -> Any:
    """What the function returns, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *given).result()


def pss_bytes(pid: int | str) -> int:
    """Memory of a process; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Peak:
    """The largest memory of some processes, watched in a thread."""

    def __init__(self, name: str | None = None) -> None:
        """Of the process itself, or of those with a name."""
        self._name = name
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            found = ["self"] if self._name is None else list(_processes(self._name))
            self.bytes = max([self.bytes, *map(pss_bytes, found)])
            time.sleep(0.2)


def _processes(name: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def cpu_seconds(name: str) -> float:
    """Seconds of a core that the processes with a name have used."""
    ticks = 0
    for pid in _processes(name):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode, and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def read_as_a_rank(settings: dict[str, Any]) -> None:
    """Reads for some seconds, then for as many a micro-batch a second, and writes what was seen."""
    peak = Peak()
    spec: OrderSpec = settings["spec"]
    Order(spec)  # as each rank of a training does
    site = RaySite(["train"])
    count = 0
    first = 0.0
    rows = site.micro_batches(0)
    for row in rows:
        decode_micro_batch(row, spec.token_columns)
        count += 1
        if count == 1:
            first = time.time()
        elif time.time() - first > settings["seconds"]:
            break
    rate = (count - 1) / (time.time() - first)
    used, began = cpu_seconds(COORDINATOR), time.time()
    while time.time() - began < settings["seconds"]:
        decode_micro_batch(next(rows), spec.token_columns)
        time.sleep(1)
    idle_cores = (cpu_seconds(COORDINATOR) - used) / (time.time() - began)
    seen = {"first": first, "rate": rate, "peak": peak.bytes, "idle_cores": idle_cores}
    (settings["folder"] / f"rank-{site.rank}.json").write_text(json.dumps(seen))


def measure_feed(folder: Path, pairs: int, workers: int, seconds: float) -> dict[str, float]:
    ray.init(
        address="local",
        num_cpus=(os.cpu_count() or 1) + LOCAL_EXTRA_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        return _measure_feed(folder, pairs, workers, seconds)
    finally:
        ray.shutdown()


def _measure_feed(folder: Path, pairs: int, workers: int, seconds: float) -> dict[str, float]:
    rows = folder / "data"
    in_a_process(write_rows, rows, pairs)
    spec = OrderSpec(
        rows=rows,
        token_files=folder / "tokens",
        split=TRAIN,
        columns=(MARGIN,),
        seed=0,
        global_batch_size=64,
        micro_batch_size=8,
        num_workers=workers,
        num_epochs=3,
    )
    peaks = {"driver": Peak(), "reader": Peak(READER)}

    # What the driver of a training does.
    began = time.time()
    order = Order(spec)
    open_tokens(order).close()
    prepared = time.time()
    chunks = cut_into_chunks(order, start_step=0)
    notes = BatchNotes(folder / "in-progress")

    def dataset() -> ray.data.Dataset:
        (folder / "made").write_text(str(time.time()))
        return micro_batch_dataset(spec, chunks, notes)

    with notes.reporting_deaths():
        TorchTrainer(
            read_as_a_rank,
            train_loop_config={"spec": spec, "seconds": seconds, "folder": folder},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, resources_per_worker={"CPU": 1}
            ),
            datasets={"train": dataset},
            dataset_config=ray.train.DataConfig(
                datasets_to_split=["train"],
                execution_options=ordered_execution(),
                enable_shard_locality=False,
            ),
            run_config=ray.train.RunConfig(name="feed", storage_path=str(folder / "ray")),
        ).fit()
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    first = min(rank["first"] for rank in ranks)
    gib = {name: peak.bytes / 2**30 for name, peak in peaks.items()}
    gib["rank"] = max(rank["peak"] for rank in ranks) / 2**30
    return {
        "feed_prepare_s": prepared - began,
        "feed_first_s": first - float((folder / "made").read_text()),
        "feed_start_s": first - began,
        "feed_rate": sum(rank["rate"] for rank in ranks),
        "feed_idle_cores": max(rank["idle_cores"] for rank in ranks),
        "feed_peak_gib": max(gib.values()),
        **{f"feed_{name}_gib": value for name, value in gib.items()},
    }


def measure_scoring(folder: Path, count: int) -> dict[str, float]:
    """Memory of the driver and of the largest actor while pairs are scored, and the seconds."""
    from madpo_ray.config import ActorPool, ForwardOptions, ModelConfig
    from madpo_ray.scoring.actors import score_rows
    from madpo_ray.scoring.scorers import PolicyLogps

    folder.mkdir()
    make_conversations(folder, 1)
    in_a_process(write_rows, folder / "data", count, SHORT, 8000)
    model = ModelConfig(model_name_or_path=str(folder / "model"))
    scorer = PolicyLogps(folder / "model", model, columns=REF_LOGPS, forward=ForwardOptions(64))
    peaks = {"driver": Peak(), "actor": Peak(SCORER)}
    ray.init(
        address="local",
        num_cpus=(os.cpu_count() or 1) + LOCAL_EXTRA_CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options = ordered_execution()
    began = time.monotonic()
    try:
        scored = score_rows(
            folder / "data",
            [scorer],
            ActorPool(2, 2, 1.0, 0.0),
            batch_size=256,
            notes=BatchNotes(folder / "in-progress"),
            kept=folder / "kept",
        )
    finally:
        ray.shutdown()
    if len(scored) != count:
        raise RuntimeError(f"{len(scored)} of {count} pairs came out")
    gib = {f"scoring_{name}_gib": peak.bytes / 2**30 for name, peak in peaks.items()}
    return {"scoring_s": time.monotonic() - began, **gib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="how long each rank reads")
    parser.add_argument("--folder", type=Path, help="for the rows; default: a temporary one")
    parser.add_argument("--texts", type=int, default=40_000, help="pairs of the file for pairs")
    parser.add_argument("--prepare-with-trl", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare_with_trl is not None:
        prepare_with_trl(arguments.prepare_with_trl, arguments.workers)
        return

    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    found = {}
    try:
        if arguments.texts:
            texts = arguments.texts
            found = in_a_process(measure_pairs, folder / "pairs", texts, arguments.workers)
            print(found, flush=True)
        if arguments.pairs:
            (folder / "feed").mkdir()
            count, seconds = arguments.pairs, arguments.seconds
            found |= measure_feed(folder / "feed", count, arguments.workers, seconds)
            print(found, flush=True)
            # Each in a process of its own: what one leaves behind is not the other's.
            for name, size in (("few_", min(FEW_PAIRS, count)), ("", count)):
                scored = in_a_process(measure_scoring, folder / f"{name}scoring", size)
                found |= {f"{name}{key}": value for key, value in scored.items()}
    finally:
        shutil.rmtree(folder)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
