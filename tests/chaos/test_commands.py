"""Commands whose driver is killed at its file operations, on a Ray that lives on."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from madpo_ray import pipeline
from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.artifacts.tables import column_names, read_columns, rows_folder
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import evaluate, margins, pairs, reward, train
from madpo_ray.stages.stage import Stage
from madpo_ray.training.metrics import read_metrics
from support.faults import Record, arm
from support.judges import NOTES
from support.nodes import nodes_of_one_cpu
from support.pairs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

MIN_FAULTS = 4
MAX_FAULTS = 7  # at operations 1, 2, 4, 7, 11, 16, 22
STAGES = [pairs.STAGE, reward.STAGE, margins.STAGE, train.STAGE, evaluate.STAGE]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where judges note what they do."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def cluster(notes: Path) -> Iterator[tuple[str, int]]:
    """A Ray that no command starts or ends: its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [BIN / "ray", "start", "--head", "--num-cpus=8", f"--port={port}", "--block"]
    start += ["--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    process = subprocess.Popen(
        start,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, NOTES: str(notes)},
    )
    status = [BIN / "ray", "status", f"--address=127.0.0.1:{port}"]
    try:
        while subprocess.run(status, capture_output=True, check=False).returncode:
            assert process.poll() is None, "ray did not start"
        yield f"127.0.0.1:{port}", process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="module")
def address(cluster: tuple[str, int]) -> str:
    return cluster[0]


@pytest.fixture(scope="module")
def ray_head(cluster: tuple[str, int]) -> int:
    return cluster[1]


def run_in_this_process(raw: dict[str, Any], stage: str, number: int | None) -> None:
    config = parse_config(raw)
    config.run.folder.mkdir(parents=True, exist_ok=True)
    with (config.run.folder.parent / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if number is not None:
        arm(config.run.folder, number, "kill -9")
    one = next(candidate for candidate in STAGES if candidate.name == stage)
    pipeline.run_stage(config, one, say=lambda what: None)


def start(raw: dict[str, Any], stage: Stage, number: int | None = None) -> Any:
    """A process that runs a stage, and is killed at an operation on the run's files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ray.train.torch", "ray.data", "deepspeed", "transformers", "peft", "madpo_ray.pipeline"]
    )
    process = context.Process(target=run_in_this_process, args=(raw, stage.name, number))
    process.start()
    return process


def run(raw: dict[str, Any], stage: Stage, number: int | None = None) -> int | None:
    process = start(raw, stage, number)
    process.join()
    code: int | None = process.exitcode
    return code


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, pairs_file: Path, address: str, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """All stages, undisturbed."""
    raw = tiny_run(model_folder, pairs_file, tmp_path_factory.mktemp("finished"))
    del raw["sft"]
    raw["cluster"] = {"num_workers": 1, "address": address}
    raw["train"]["save_steps"] = 2
    config = parse_config(raw)
    for stage in STAGES:
        assert run(raw, stage) == 0
    return config


def copy_before(stage: Stage, finished: Config, storage: Path) -> Config:
    """A copy of the run as it was before a stage ran."""
    raw = finished.model_dump(mode="json")
    raw["run"]["storage_path"] = str(storage)
    config = parse_config(raw)
    config.run.folder.mkdir(parents=True)
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(earlier.folder(finished), earlier.folder(config))
    return config


def assert_same_result(stage: Stage, config: Config, finished: Config) -> None:
    """Rows, weights or evaluation are those of the undisturbed run."""
    ours, theirs = stage.folder(config), stage.folder(finished)
    assert stage.is_finished(config)
    if rows_folder(theirs).exists():
        names = column_names(rows_folder(theirs))
        tables = [read_columns(rows_folder(folder), names) for folder in (ours, theirs)]
        assert tables[0].equals(tables[1])
    if (theirs / "model").exists():
        weights = [load_file(path / "model" / "model.safetensors") for path in (ours, theirs)]
        assert weights[0].keys() == weights[1].keys()
        assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    if (theirs / "evaluation.json").exists():
        hashes = [hash_file(folder / "evaluation.json") for folder in (ours, theirs)]
        assert hashes[0] == hashes[1]
    left = [path for path in config.run.folder.iterdir() if ".lease" not in path.name]
    assert not any(path.name.endswith((".partial", ".old")) for path in left)
    assert not any("trash" in path.name for path in left)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_driver_is_killed(stage: Stage, finished: Config, tmp_path: Path, record: Record) -> None:
    """At its first operations, and at later ones; the same command finishes."""
    count = 0
    number = 1
    while count < MAX_FAULTS:
        config = copy_before(stage, finished, tmp_path / str(number))
        raw = config.model_dump(mode="json")
        if run(raw, stage, number) == 0:
            break
        assert run(raw, stage) == 0
        assert_same_result(stage, config, finished)
        shutil.rmtree(tmp_path / str(number))
        count += 1
        number += count
    assert count >= MIN_FAULTS
    record(f"driver of {stage.name}", "kill -9 at the n-th file operation", count, "same result")


def judged_copy(finished: Config, storage: Path, judge: str) -> Config:
    """The run before its pairs were scored; a judge and the reference will score them."""
    config = copy_before(margins.STAGE, finished, storage)
    raw = config.model_dump(mode="json")
    raw["reward"] = {"source": f"support.judges:{judge}"}
    raw["margins"]["calibration"] = "none"
    raw["scoring"] |= {"min_actors": 2, "batch_size": 2, "per_device_batch_size": 2}
    return parse_config(raw)


def numbers_of(config: Config) -> dict[str, list[Any]]:
    names = ["pair_id", "margin", "ref_chosen_logps", "ref_rejected_logps"]
    found: dict[str, list[Any]] = read_columns(margins.STAGE.rows(config), names).to_pydict()
    return found


@pytest.mark.parametrize("victim", ["actor", "driver"])
def test_scoring_is_killed(
    victim: str, finished: Config, ray_head: int, notes: Path, tmp_path: Path, record: Record
) -> None:
    """In the middle of the pass; pairs whose scores are on the disk are not scored again."""
    scored, hold = notes / "scored.txt", notes / "hold"
    undisturbed = judged_copy(finished, tmp_path / "undisturbed", "note_prompts")
    assert run(undisturbed.model_dump(mode="json"), margins.STAGE) == 0
    expected = numbers_of(undisturbed)
    prompts = read_columns(pairs.STAGE.rows(undisturbed), ["pair_id", "prompt"]).to_pylist()
    prompt_of = {row["pair_id"]: row["prompt"] for row in prompts}

    count = 0
    for num_files in (1, 8, 20):
        scored.write_text("")
        config = judged_copy(finished, tmp_path / str(num_files), "note_prompts")
        raw = config.model_dump(mode="json")
        process = start(raw, margins.STAGE)
        while len(kept_files(config)) < num_files:
            assert process.is_alive()
            time.sleep(0.005)
        hold.touch()  # what is being scored is the last until the kill
        try:
            known = scored_ids(config)
            if victim == "actor":
                scoring_actors(ray_head)[0].kill()
            else:
                process.kill()
                time.sleep(3)  # the actors of a killed driver end a moment later
        finally:
            hold.unlink()
        process.join()
        if victim == "actor":
            assert process.exitcode == 0  # Ray started another
        else:
            assert process.exitcode == -signal.SIGKILL
            assert run(raw, margins.STAGE) == 0

        calls = Counter(scored.read_text().splitlines())
        assert {calls[prompt_of[one]] for one in known} == {2}  # once for each response
        assert set(calls) == set(prompt_of.values())
        assert numbers_of(config) == expected
        count += 1
    how = "same result, none scored twice"
    record("scoring in margins", f"kill -9 of the {victim}", count, how)


def test_disk_is_full_where_an_actor_writes(
    finished: Config, notes: Path, tmp_path: Path, record: Record
) -> None:
    """It is said, and the same command finishes once there is room."""
    undisturbed = judged_copy(finished, tmp_path / "undisturbed", "count_kind_words")
    assert run(undisturbed.model_dump(mode="json"), margins.STAGE) == 0
    config = judged_copy(finished, tmp_path / "full", "fill_disk_once")
    raw = config.model_dump(mode="json")
    assert run(raw, margins.STAGE) != 0
    assert (notes / "full").exists()
    log = (tmp_path / "full" / "log.txt").read_text()
    assert "No space left on device" in log
    assert run(raw, margins.STAGE) == 0
    assert numbers_of(config) == numbers_of(undisturbed)
    record("scoring in margins", "disk full where an actor writes", 1, "resumed, same result")


def unscored_copy(finished: Config, storage: Path) -> Config:
    """The run before its pairs were scored; training will score them."""
    config = copy_before(margins.STAGE, finished, storage)
    raw = config.model_dump(mode="json")
    raw["margins"]["mode"] = "stream"
    raw["train"] |= {"max_steps": -1, "num_train_epochs": 2}
    return parse_config(raw)


def kept_paths(config: Config) -> list[Path]:
    """The files with scores."""
    return list(config.run.ray_folder.glob("margins-*/kept/[!.]*.parquet"))


def kept_files(config: Config) -> dict[str, int]:
    """Their names, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in kept_paths(config)}


def scored_ids(config: Config) -> list[str]:
    """pair_id of everything that is in them."""
    tables = [pq.read_table(file) for file in kept_paths(config)]
    return [one for table in tables for one in table["pair_id"].to_pylist()]


def assert_each_pair_was_scored_once(config: Config) -> None:
    rows = read_columns(pairs.STAGE.rows(config), ["pair_id", "split"]).to_pylist()
    expected = sorted(row["pair_id"] for row in rows if row["split"] != "test")
    assert sorted(scored_ids(config)) == expected


def losses(config: Config) -> list[float]:
    lines = read_metrics(train.STAGE.folder(config) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


def test_streamed_training_is_killed(finished: Config, tmp_path: Path, record: Record) -> None:
    """Once so many files of scores are there; what is written is not scored again."""
    undisturbed = unscored_copy(finished, tmp_path / "undisturbed")
    assert run(undisturbed.model_dump(mode="json"), train.STAGE) == 0
    assert_each_pair_was_scored_once(undisturbed)
    total = len(kept_files(undisturbed))

    count = 0
    for share in (0.0, 0.4, 0.7, 1.0):
        config = unscored_copy(finished, tmp_path / str(share))
        raw = config.model_dump(mode="json")
        process = start(raw, train.STAGE)
        while process.is_alive() and len(kept_files(config)) < share * total:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        time.sleep(3)  # the actors of a killed driver end a moment later
        before = kept_files(config)
        assert run(raw, train.STAGE) == 0
        assert before.items() <= kept_files(config).items()
        assert_each_pair_was_scored_once(config)
        assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-5)
        count += 1
    record("streamed training", "kill -9 of the driver", count, "same losses, each scored once")


def scoring_actors(ray_process: int) -> list[psutil.Process]:
    """Actors that score pairs, below a process of a Ray of ours."""
    found = []
    for process in psutil.Process(ray_process).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline())
            if "_ChunkScorer" in name or "ScoringActor" in name:
                found.append(process)
    return found


def test_scoring_actor_of_a_training_is_killed(
    finished: Config, ray_head: int, tmp_path: Path, record: Record
) -> None:
    """Ray starts another, and the training continues."""
    undisturbed = unscored_copy(finished, tmp_path / "undisturbed")
    assert run(undisturbed.model_dump(mode="json"), train.STAGE) == 0
    total = len(kept_files(undisturbed))
    count = 0
    for share in (0.0, 0.3, 0.5):
        config = unscored_copy(finished, tmp_path / str(share))
        process = start(config.model_dump(mode="json"), train.STAGE)
        while len(kept_files(config)) < share * total or not (actors := scoring_actors(ray_head)):
            assert process.is_alive()
            time.sleep(0.005)
        before = kept_files(config)
        actors[0].kill()
        process.join()
        assert process.exitcode == 0
        assert before.items() <= kept_files(config).items()
        assert_each_pair_was_scored_once(config)
        assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-5)
        count += 1
    record(
        "streamed training", "kill -9 of a scoring actor", count, "same losses, each scored once"
    )


@pytest.fixture
def nodes() -> Iterator[Any]:
    """More than the actors need."""
    with nodes_of_one_cpu(7) as cluster:
        yield cluster


def test_node_with_a_scoring_actor_is_removed(
    finished: Config, nodes: Any, tmp_path: Path, record: Record
) -> None:
    """Once some pairs are scored. The others take over, or the same command finishes."""
    stage = margins.STAGE
    raw = copy_before(stage, finished, tmp_path).model_dump(mode="json")
    raw["cluster"]["address"] = nodes.address
    raw["scoring"] |= {"min_actors": 2, "batch_size": 1, "per_device_batch_size": 1}
    config = parse_config(raw)
    process = start(raw, stage)
    while not kept_files(config):
        assert process.is_alive()
        time.sleep(0.005)
    nodes.remove_node(node_with_a_scoring_actor(nodes), allow_graceful=False)
    process.join()
    if process.exitcode != 0:
        assert run(raw, stage) == 0

    names = ["pair_id", "margin", "ref_chosen_logps"]
    ours, theirs = (read_columns(stage.rows(one), names) for one in (config, finished))
    assert ours["pair_id"] == theirs["pair_id"]
    for name in names[1:]:
        assert ours[name].to_pylist() == pytest.approx(theirs[name].to_pylist(), abs=1e-4)
    record("scoring in margins", "its node is removed", 1, "same result")


def node_with_a_scoring_actor(nodes: Any) -> Any:
    raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes.worker_nodes}
    return next(node for node, pid in raylets.items() if scoring_actors(pid))


def test_node_with_a_scoring_actor_of_a_training_is_removed(
    finished: Config, tmp_path: Path, record: Record
) -> None:
    """The others take over, or the same command finishes."""
    undisturbed = unscored_copy(finished, tmp_path / "undisturbed")
    assert run(undisturbed.model_dump(mode="json"), train.STAGE) == 0
    with nodes_of_one_cpu(9) as nodes:
        config = unscored_copy(finished, tmp_path / "removed")
        raw = config.model_dump(mode="json")
        raw["cluster"]["address"] = nodes.address
        process = start(raw, train.STAGE)
        # The validation pairs are scored by a pass of their own, before.
        chunks = len(kept_files(undisturbed))
        while len(kept_files(config)) < chunks // 2:
            assert process.is_alive()
            time.sleep(0.005)
        before = kept_files(config)
        nodes.remove_node(node_with_a_scoring_actor(nodes), allow_graceful=False)
        process.join()
        if process.exitcode != 0:
            assert run(raw, train.STAGE) == 0
    assert before.items() <= kept_files(config).items()
    assert_each_pair_was_scored_once(config)
    assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-5)
    record(
        "streamed training", "a scoring actor's node is removed", 1, "same losses, each scored once"
    )


def test_second_command_at_random_moments(finished: Config, tmp_path: Path, record: Record) -> None:
    """It is refused as long as the first runs."""
    rng = random.Random(0)
    count = 0
    config = copy_before(reward.STAGE, finished, tmp_path)
    raw = config.model_dump(mode="json")
    process = start(raw, reward.STAGE)
    while not (config.run.folder / ".lease.json").exists():
        time.sleep(0.01)
    while process.is_alive():
        for stage in (margins.STAGE, reward.STAGE):
            refusal = ""
            try:
                pipeline.run_stage(config, stage, say=lambda what: None)
            except UserError as error:
                refusal = str(error)
            if process.is_alive():
                assert "is in use, another command writes it: reward" in refusal
                count += 1
        time.sleep(rng.uniform(0, 1))
    process.join()
    assert process.exitcode == 0
    assert_same_result(reward.STAGE, config, finished)
    assert count >= 3
    record("reward", "another command meanwhile", count, "it is refused; same result")


def test_run_moves_between_kill_and_resume(
    finished: Config, tmp_path: Path, record: Record
) -> None:
    count = 0
    for stage in (reward.STAGE, train.STAGE):
        config = copy_before(stage, finished, tmp_path / stage.name)
        raw = config.model_dump(mode="json")
        process = start(raw, stage)
        while not list(config.run.folder.glob("ray/*/checkpoint_*")) and process.is_alive():
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        moved = tmp_path / f"{stage.name}-moved"
        time.sleep(2)  # the workers of a killed driver end a moment later
        shutil.move(tmp_path / stage.name, moved)
        raw["run"]["storage_path"] = str(moved)
        assert run(raw, stage) == 0
        assert_same_result(stage, parse_config(raw), finished)
        count += 1
    record("reward, train", "kill -9, then the run is moved", count, "resumed, same result")
