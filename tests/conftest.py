"""Tiny random models, pairs to learn from, and one local Ray for all tests that need it."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "120")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
import json
import multiprocessing
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.config import Config
from madpo_ray.config_file import parse_config

WORDS = [
    "the",
    "a",
    "film",
    "actor",
    "scene",
    "plot",
    "is",
    "was",
    "good",
    "bad",
    "great",
    "dull",
    "fine",
    "poor",
    "warm",
    "cold",
    "bright",
    "flat",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=TEMPLATE,
    )


def tiny_config(model_type: str, vocab_size: int = 400, **changes: Any) -> Any:
    from transformers import AutoConfig

    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
        }
    return AutoConfig.for_model(model_type, **{**common, **sizes, **changes})


def make_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, **changes), attn_implementation="eager" if model_type == "gemma2" else "sdpa"
    )
    with torch.no_grad():  # larger than the usual initialisation, so that attention has something to say
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15 if "embed" not in name else 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, *, conversational: bool = False) -> list[dict[str, Any]]:
    """Pairs whose chosen response is the one with the kinder words, four times of five."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        kind, unkind = (
            (" ".join(rng.choices(words, k=rng.randint(2, 6))))
            for words in (["good", "great", "warm"], ["bad", "dull", "poor"])
        )
        agrees = rng.random() < 0.8
        chosen, rejected = (kind, unkind) if agrees else (unkind, kind)
        prompt = f"say {number}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        row: dict[str, Any] = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
        if conversational:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
        rows.append({**row, "chosen_score": float(agrees), "rejected_score": float(not agrees)})
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(90))


@pytest.fixture
def raw_config(model_folder: Path, pairs_file: Path, tmp_path: Path) -> dict[str, Any]:
    return raw_config_for(model_folder, pairs_file, tmp_path)


def raw_config_for(model_folder: Path, pairs_file: Path, storage: Path) -> dict[str, Any]:
    training = {"learning_rate": 1e-2, "global_batch_size": 8, "per_device_train_batch_size": 2, "logging_steps": 1}
    return {
        "model": {"model_name_or_path": str(model_folder)},
        "data": {
            "files": [str(pairs_file)],
            "max_length": 64,
            "validation_fraction": 0.25,
            "test_fraction": 0.2,
            "keep_columns": ["chosen_score", "rejected_score"],
        },
        "run": {"name": "tiny", "storage_path": str(storage)},
        "cluster": {"num_workers": 2},
        "sft": {**training, "learning_rate": 1e-3, "max_steps": 2},
        "reward": {**training, "num_train_epochs": 3, "use_peft": True, "lora_r": 4},
        "train": {**training, "learning_rate": 1e-3, "max_steps": 5},
        "evaluate": {
            "num_samples": 4,
            "num_shown": 2,
            "max_new_tokens": 4,
            "chosen_score_column": "chosen_score",
            "rejected_score_column": "rejected_score",
        },
    }


@pytest.fixture
def config(raw_config: dict[str, Any]) -> Config:
    return parse_config(raw_config)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    import ray

    # Logical CPUs, more than there are: the tests' workers wait more than they compute.
    ray.init(num_cpus=8, num_gpus=0, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished_run(
    model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory, ray_local: None
) -> tuple[Config, list[str]]:
    """A tiny run of stages 1 to 5 on two workers, and what it said."""
    from madpo_ray import pipeline

    raw = raw_config_for(model_folder, pairs_file, tmp_path_factory.mktemp("runs"))
    del raw["sft"]  # test_jobs.py runs the pipeline with it
    config = parse_config(raw)
    said: list[str] = []
    pipeline.run_all(config, say=lambda what: said.append(str(what)))
    return config, said


@pytest.fixture(scope="session")
def scored_pairs(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet of 75 pairs or so as stage 3 would write them, with margins drawn at random: what a policy trains on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from madpo_ray.formats import tokenize_pair
    from madpo_ray.scoring import PairScorer

    rng = random.Random(0)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    tokenizer = make_tokenizer()
    table = pa.Table.from_pylist(
        [
            {
                "pair_id": f"pair-{i}",
                "split": "validation" if i % 6 == 5 else "train",
                **tokenize_pair(row, tokenizer, 64),
                "margin": rng.gauss(1, 3),
                "importance": rng.uniform(0.5, 2),
            }
            for i, row in enumerate(rows)
        ]
    )
    settings = parse_config(raw_config_for(model_folder, pairs_file, Path("runs"))).model
    scorer = PairScorer(model=settings, micro_batch_size=8, num_threads=1, policies={"ref_": model_folder})
    folder = tmp_path_factory.mktemp("scored")
    pq.write_table(scorer(table), folder / "part-000000.parquet")
    return folder


@pytest.fixture
def policy_job(config: Config, scored_pairs: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes a policy's training on `scored_pairs`; jobs of one name share checkpoints."""
    from madpo_ray import train

    def make(name: str, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        raw = config.model_dump()
        raw["data"]["keep_columns"] = ["chosen_score", "rejected_score", "importance"]
        raw["train"] |= changes
        raw["sft"] = None
        raw["model"] |= model or {}
        job = train.job(parse_config(raw), output=tmp_path / name, experiment=name)
        return dataclasses.replace(job, source=scored_pairs)

    return make


def _be_a_rank(job: Any, rank: int, world_size: int, store: str, outcomes: Any) -> None:
    import torch.distributed as dist

    from madpo_ray.worker import Local, join_ranks, train_rank

    join_ranks(rank, world_size, Path(store))
    try:
        outcomes.put(train_rank(job, Local(job)))
    except RuntimeError as error:
        outcomes.put(str(error))
        raise
    dist.destroy_process_group()


class Ranks:
    """Processes that train a job over gloo, as Ray's workers do, without Ray: started in a second, and killed."""

    def __init__(self, job: Any, world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["deepspeed", "transformers", "peft", "madpo_ray.worker", "madpo_ray.train"])
        store = tempfile.mktemp(dir=folder)
        self._outcomes = context.Queue()
        self.processes = [
            context.Process(target=_be_a_rank, args=(job, rank, world_size, store, self._outcomes))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def join(self) -> list[int]:
        """Waits for the end; the exit codes, negative for a signal."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def outcome(self) -> Any:
        """Waits, and gives what all ranks returned."""
        codes = self.join()
        assert codes == [0] * len(codes), codes
        outcomes = [self._outcomes.get(timeout=10) for _ in codes]
        assert outcomes == [outcomes[0]] * len(codes)
        return outcomes[0]

    def kill_when(self, ready: Callable[[], Any]) -> None:
        """kill -9 of all ranks once something is there."""
        while not ready():
            assert all(process.is_alive() for process in self.processes)
            time.sleep(0.005)
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        assert self.join() == [-signal.SIGKILL] * len(self.processes)

    def errors(self) -> list[str]:
        """Waits, and gives what each rank died of."""
        codes = self.join()
        assert codes == [1] * len(codes), codes
        return [self._outcomes.get(timeout=10) for _ in codes]


@pytest.fixture
def train_on(tmp_path: Path) -> Callable[..., Any]:
    """Trains a job on a number of ranks; gives their outcome."""
    return lambda job, world_size: Ranks(job, world_size, tmp_path).outcome()


Edit = Callable[[dict[str, Any]], None]
