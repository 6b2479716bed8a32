"""A run's micro-batches, as Ray gives them to the ranks."""

import dataclasses
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo_ray.config import ActorPool
from madpo_ray.data.micro_batches import NUMBER
from madpo_ray.data.order import Order
from madpo_ray.passes import BatchNotes, ordered_execution
from madpo_ray.scoring.judges import FunctionReward
from madpo_ray.scoring.streamed import StreamedScores
from madpo_ray.training.feed import (
    MAX_BLOCKS,
    SCHEDULER_ROUND_S,
    Chunks,
    Pacing,
    cut_into_chunks,
    datasets_of,
    micro_batch_dataset,
)
from support.ranks import MakeJob


@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 5), st.integers(1, 9))
def test_each_rank_gets_its_micro_batches_in_order(
    start: int, rounds: int, workers: int, size: int
) -> None:
    start *= workers
    chunks = Chunks(start, start + rounds * workers, workers, size)
    for rank in range(workers):
        own = [n for chunk in range(rank, len(chunks), workers) for n in chunks.numbers(chunk)]
        assert own == list(range(start + rank, chunks.stop, workers))


def test_chunks_of_a_round_are_equally_long() -> None:
    """Ray splits blocks so that ranks have equally many rows: there is nothing to split."""
    chunks = Chunks(0, 3 * 10, 3, 4)
    sizes = [len(chunks.numbers(chunk)) for chunk in range(len(chunks))]
    assert sizes == [4] * 6 + [2] * 3


def test_small_run_has_small_chunks_and_a_long_one_few(policy_job: MakeJob) -> None:
    order = Order(policy_job("chunks", max_steps=5).order_spec(2))
    assert cut_into_chunks(order, 0).size == 1
    assert cut_into_chunks(order, 3).start == order.first_micro_batch(3)
    long = Order(policy_job("chunks", max_steps=3000, num_train_epochs=999).order_spec(2))
    assert MAX_BLOCKS / 2 < len(cut_into_chunks(long, 0)) <= MAX_BLOCKS + 2


def test_finished_run_has_a_row_for_each_rank(policy_job: MakeJob) -> None:
    """It reads nothing, but Ray needs one."""
    order = Order(policy_job("finished", max_steps=5).order_spec(2))
    chunks = cut_into_chunks(order, 5)
    assert [list(chunks.numbers(chunk)) for chunk in range(len(chunks))] == [
        [order.num_micro_batches - 2],
        [order.num_micro_batches - 1],
    ]


@pytest.mark.parametrize(
    ("max_steps", "start_step", "expected"),
    [
        (25, 0, ["first_epoch", "train"]),
        (25, 9, ["first_epoch", "train"]),
        (25, 10, ["train"]),
        (25, 25, ["train"]),
        (10, 0, ["first_epoch"]),
        (4, 3, ["first_epoch"]),
        (4, 4, ["train"]),
    ],
)
def test_only_the_first_epoch_is_scored_on_its_way(
    max_steps: int, start_step: int, expected: list[str], policy_job: MakeJob, tmp_path: Path
) -> None:
    """An epoch is 10 steps; a finished run reads nothing, but Ray needs a row."""
    order = Order(policy_job("epochs", max_steps=max_steps).order_spec(2))
    assert order.steps_per_epoch == 10
    notes = BatchNotes(tmp_path)
    streamed = StreamedScores(
        tmp_path, ActorPool(1, 1, 1.0, 0.0), 8, (FunctionReward("a:b", key="reward.source"),)
    )
    assert list(datasets_of(order, start_step, notes, streamed)) == expected
    assert list(datasets_of(order, start_step, notes, None)) == ["train"]
    nothing_to_score = dataclasses.replace(streamed, scorers=())
    assert list(datasets_of(order, start_step, notes, nothing_to_score)) == ["train"]


def test_chunks_end_with_an_epoch(policy_job: MakeJob) -> None:
    order = Order(policy_job("epochs", max_steps=25).order_spec(2))
    first = cut_into_chunks(order, 3, 10)
    rest = cut_into_chunks(order, 10)
    assert first.start == order.first_micro_batch(3)
    assert first.stop == rest.start == order.first_micro_batch(10)
    assert rest.stop == order.num_micro_batches


def test_chunks_that_are_scored_have_few_pairs(policy_job: MakeJob) -> None:
    """Two pairs in a micro-batch; a rank waits for the scores of its first chunk."""
    order = Order(policy_job("long", max_steps=30_000, num_train_epochs=9999).order_spec(2))
    assert cut_into_chunks(order, 0).size > 100
    assert cut_into_chunks(order, 0, max_pairs=16).size == 8
    assert cut_into_chunks(order, 0, max_pairs=1).size == 1


def test_scheduler_that_has_nothing_to_do_is_slowed() -> None:
    began = time.monotonic()
    pacing = Pacing()
    for _ in range(3):
        pacing.on_execution_step(executor=None)
    assert time.monotonic() - began >= 3 * SCHEDULER_ROUND_S


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_ray_lets_the_feed_pace_its_scheduler(
    policy_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = policy_job("feed", max_steps=9).order_spec(1)
    rounds: list[object] = []
    monkeypatch.setattr(Pacing, "on_execution_step", lambda self, executor: rounds.append(executor))
    notes = BatchNotes(tmp_path / "notes")
    with notes.reporting_deaths():
        dataset = micro_batch_dataset(spec, Chunks(0, 2, 1, 1), notes)
        assert sum(1 for _ in dataset.iter_batches(batch_size=None)) == 2
    assert rounds


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("workers", "size"), [(1, 4), (2, 3), (3, 2)])
def test_ray_gives_each_rank_its_micro_batches(
    workers: int, size: int, policy_job: MakeJob, tmp_path: Path
) -> None:
    """Chunks of several rows, through the split that Ray Train makes."""
    spec = policy_job("feed", max_steps=9).order_spec(workers)
    order = Order(spec)
    chunks = Chunks(order.first_micro_batch(2), order.num_micro_batches, workers, size)
    notes = BatchNotes(tmp_path / "notes")
    with notes.reporting_deaths():
        dataset = micro_batch_dataset(spec, chunks, notes)
        dataset.context.execution_options = ordered_execution()
        shards = dataset.streaming_split(workers, equal=True)
        seen: list[list[int]] = [[] for _ in shards]

        def read(rank: int) -> None:
            for table in shards[rank].iter_batches(batch_size=None, batch_format="pyarrow"):
                seen[rank] += table[NUMBER].to_pylist()

        threads = [threading.Thread(target=read, args=(rank,)) for rank in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for rank, own in enumerate(seen):
        assert own == list(range(chunks.start + rank, chunks.stop, workers))
