"""Fixtures: tiny models, pairs, jobs, and one local Ray for all tests that need it."""

import os
import secrets

# Ray listens on all interfaces; only the processes of these tests know the token.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers import judges from tests/support.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")])
)

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pytest

from madpo_ray.artifacts.tables import write_table
from madpo_ray.columns import MARGIN, REF_LOGPS
from madpo_ray.config import Config, DataConfig, ModelConfig, PolicyConfig, parse_config
from madpo_ray.training.job import PolicyTask, TrainingJob
from support.faults import ROWS, Record
from support.models import make_model, make_tokenizer
from support.pairs import make_rows, tiny_run, write_jsonl
from support.ranks import THIRTY_STEPS, MakeJob, Ranks, TrainOn, logged
from support.reference import with_reference

# How long an example takes is a matter of the machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(90))


@pytest.fixture
def raw_config(model_folder: Path, pairs_file: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_run(model_folder, pairs_file, tmp_path)


@pytest.fixture
def config(raw_config: dict[str, Any]) -> Config:
    return parse_config(raw_config)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    import ray

    # Logical CPUs, more than there are: the tests' workers wait more than they compute.
    ray.init(
        address="local",  # never one that happens to run on this machine
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def finished_run(
    model_folder: Path,
    pairs_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ray_local: None,
) -> tuple[Config, list[str]]:
    """A tiny run of pairs to evaluate on two workers, and what it printed."""
    from madpo_ray import pipeline

    raw = tiny_run(model_folder, pairs_file, tmp_path_factory.mktemp("runs"))
    del raw["sft"]  # test_jobs.py runs the pipeline with it
    config = parse_config(raw)
    printed: list[str] = []
    pipeline.run_all(config, say=lambda what: printed.append(str(what)))
    return config, printed


@pytest.fixture(scope="session")
def scored_pairs(
    model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """90 pairs as stage margins writes them, with random margins: what a policy reads."""
    from madpo_ray.data.formats import parse_pair
    from madpo_ray.data.tokens import tokenize_pair

    data = DataConfig(files=(str(pairs_file),))
    rng = random.Random(0)
    lines = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    tokenizer = make_tokenizer()
    table = pa.Table.from_pylist(
        [
            {
                "pair_id": f"pair-{i}",
                "split": "validation" if i % 6 == 5 else "train",
                **tokenize_pair(parse_pair(row, data), tokenizer, 64).as_columns(),
                "margin": rng.gauss(1, 3),
                "importance": rng.uniform(0.5, 2),
            }
            for i, row in enumerate(lines)
        ]
    )
    folder = tmp_path_factory.mktemp("scored") / "data"
    model = ModelConfig(model_name_or_path=str(model_folder))
    write_table(with_reference(table, model_folder, model), folder)
    return folder


def make_policy_job(model_folder: Path, rows: Path, folder: Path) -> MakeJob:
    """Makes trainings of a policy on `rows`; jobs of one name share checkpoints."""

    def make(name: str, model: dict[str, Any] | None = None, **changes: Any) -> TrainingJob:
        settings = {
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "max_steps": 5,
            **changes,
        }
        columns = [MARGIN, *REF_LOGPS]
        if "weight_column" in changes:
            columns.append(changes["weight_column"])
        return TrainingJob(
            stage="train",
            fingerprint="test",
            trial=name,
            task=PolicyTask(columns=tuple(columns)),
            settings=PolicyConfig(**settings),
            model=ModelConfig(model_name_or_path=str(model_folder), **(model or {})),
            seed=0,
            num_threads=1,
            base_folder=model_folder,
            rows=rows,
            output=folder / name,
            storage=folder / "ray",
        )

    return make


@pytest.fixture
def policy_job(model_folder: Path, scored_pairs: Path, tmp_path: Path) -> MakeJob:
    return make_policy_job(model_folder, scored_pairs, tmp_path)


@pytest.fixture
def train_on(tmp_path: Path) -> TrainOn:
    """Trains a job on a number of ranks; gives their outcome."""
    return lambda job, world_size: Ranks(job, world_size, tmp_path).outcome()


@pytest.fixture(scope="session")
def undisturbed(
    model_folder: Path, scored_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainingJob:
    """Thirty steps on one rank that nothing happened to, eight pairs at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make = make_policy_job(model_folder, scored_pairs, folder)
    job = make("undisturbed", **THIRTY_STEPS, per_device_train_batch_size=8)
    Ranks(job, 1, folder).outcome()
    losses = logged(job)
    assert len(losses) == len(set(losses.tolist())) == 30
    return job


@pytest.fixture
def record() -> Record:
    """Adds a row to the table: where, which fault, how many of it, and how each ended."""

    def add(place: str, fault: str, count: int, outcome: str) -> None:
        ROWS.append((place, fault, count, outcome))

    return add


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    if not ROWS:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| where | fault | faults | each time after it |")
    terminalreporter.write_line("|---|---|---|---|")
    for place, fault, count, outcome in ROWS:
        terminalreporter.write_line(f"| {place} | {fault} | {count} | {outcome} |")
    total = sum(count for _, _, count, _ in ROWS)
    terminalreporter.write_line(f"| all | | {total} | |")
