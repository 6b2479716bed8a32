"""What a killed pass has scored is not scored again."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from madpo_ray.artifacts.tables import write_table
from madpo_ray.cluster.connection import connected
from madpo_ray.columns import LENGTHS
from madpo_ray.config import ActorPool, ClusterConfig
from madpo_ray.passes import BatchNotes
from madpo_ray.scoring.actors import ScoringActor, score_rows
from madpo_ray.scoring.chunks import ScoredChunks, in_order_of


def scored(*ids: str) -> pa.Table:
    margins = [float(len(ids))] * len(ids)
    reasons = pa.nulls(len(ids), pa.string())
    return pa.table({"pair_id": list(ids), "margin": margins, "reason": reasons})


def test_keeps_chunks_by_their_pairs(tmp_path: Path) -> None:
    chunks = ScoredChunks(tmp_path / "kept", ["margin"])
    chunks.write(scored("a", "b"))
    chunks.write(scored("a"))
    assert chunks.find(scored("a", "b")["pair_id"]) == scored("a", "b")
    assert chunks.find(scored("a")["pair_id"]) == scored("a")
    assert len(list((tmp_path / "kept").glob("*.parquet"))) == 2


def test_finds_pairs_of_other_chunks(tmp_path: Path) -> None:
    """Another number of workers cuts other chunks; in_order_of gives them in order."""
    folder = tmp_path / "kept"
    assert ScoredChunks(folder, ["margin"]).find(scored("a")["pair_id"]) is None
    ScoredChunks(folder, ["margin"]).write(scored("a", "b"))
    ScoredChunks(folder, ["margin"]).write(scored("c"))
    ids = scored("c", "d", "b")["pair_id"]
    found = ScoredChunks(folder, ["margin"]).find(ids)
    assert found is not None
    assert sorted(found["pair_id"].to_pylist()) == ["b", "c"]
    assert in_order_of(found, ids.take([0, 2])).to_pylist() == [
        {"pair_id": "c", "margin": 1.0, "reason": None},
        {"pair_id": "b", "margin": 2.0, "reason": None},
    ]
    with pytest.raises(RuntimeError, match="1 pairs have no scores, such as d"):
        in_order_of(found, ids)


def test_a_success_counts_whatever_chunk_it_is_in(tmp_path: Path) -> None:
    """Also if the chunk of these very pairs has only the failure; each pair is found once."""
    folder = tmp_path / "kept"
    both = scored("a", "b")
    raised = both.set_column(2, "reason", pa.array([None, "raised ValueError: no"]))
    ScoredChunks(folder, ["margin"]).write(raised)
    ScoredChunks(folder, ["margin"]).write(raised.slice(1))
    ids = both["pair_id"]
    found = ScoredChunks(folder, ["margin"]).find(ids)
    assert found is not None
    assert found["pair_id"].to_pylist() == ["a"]
    found = ScoredChunks(folder, ["margin"]).find(ids, with_failed=True)
    assert found is not None
    assert found["pair_id"].to_pylist() == ["a", "b"]

    ScoredChunks(folder, ["margin"]).write(scored("b"))
    found = ScoredChunks(folder, ["margin"]).find(ids)
    assert found is not None
    assert found["reason"].to_pylist() == [None, None]


def test_scores_of_other_columns_do_not_count(tmp_path: Path) -> None:
    """A scorer that finished in between needs no scores, and has some of all."""
    both = scored("a", "b").append_column("ref", pa.array([1.0, 2.0]))
    ScoredChunks(tmp_path, ["margin", "ref"]).write(both)
    ScoredChunks(tmp_path, ["margin"]).write(scored("c"))
    ids = scored("a", "b", "c")["pair_id"]
    found = ScoredChunks(tmp_path, ["margin", "ref"]).find(ids)
    assert found is not None
    assert sorted(found["pair_id"].to_pylist()) == ["a", "b"]
    found = ScoredChunks(tmp_path, ["margin"]).find(ids)
    assert found is not None
    assert sorted(found["pair_id"].to_pylist()) == ["a", "b", "c"]
    assert "ref" not in found.column_names


@pytest.mark.parametrize("content", [b"", b"PAR1"])
def test_torn_chunk_is_scored_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = ScoredChunks(tmp_path, ["margin"])
    chunks.write(scored("a"))
    (file,) = tmp_path.glob("*.parquet")
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert chunks.find(scored("a")["pair_id"]) is None
    assert "so its pairs are scored again" in caplog.text


class Counted:
    """The number of a pair as its score; each call leaves a file."""

    reads = ()
    columns = ("score",)

    def __init__(self, calls: Path) -> None:
        self._calls = calls

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, rows: pa.Table) -> np.ndarray:
        ids = rows["pair_id"].to_pylist()
        (self._calls / ids[0]).touch()
        return np.array([[float(one) for one in ids]])


def test_actor_scores_what_is_missing_of_a_chunk(tmp_path: Path) -> None:
    notes = BatchNotes(tmp_path)
    kept = tmp_path / "kept"
    ScoringActor([Counted(tmp_path)], 1, notes, kept)(pa.table({"pair_id": ["2"]}))
    (tmp_path / "2").unlink()
    actor = ScoringActor([Counted(tmp_path)], 1, notes, kept)
    assert actor(pa.table({"pair_id": ["1", "2", "3"]}))["score"].to_pylist() == [1.0, 2.0, 3.0]
    assert (tmp_path / "1").exists()
    assert not (tmp_path / "2").exists()
    assert len(list(kept.glob("*.parquet"))) == 2


def test_actor_scores_a_chunk_once(tmp_path: Path) -> None:
    rows = pa.table({"pair_id": ["1", "2"]})
    for _ in range(2):
        actor = ScoringActor([Counted(tmp_path)], 1, BatchNotes(tmp_path), tmp_path / "kept")
        assert actor(rows)["score"].to_pylist() == [1.0, 2.0]
        (tmp_path / "1").unlink(missing_ok=True)
    other = ScoringActor([Counted(tmp_path / "none")], 1, BatchNotes(tmp_path), tmp_path / "kept")
    assert other(rows)["score"].to_pylist() == [1.0, 2.0]  # a call would raise


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_pass_goes_on_with_any_number_of_actors(tmp_path: Path) -> None:
    """Only the chunks that are missing are scored."""
    ids = [f"{i:04}" for i in range(100)]
    lengths = {name: [1] * 100 for name in LENGTHS.values()}
    table = pa.table({"pair_id": ids, "split": ["train"] * 100, **lengths})
    write_table(table, tmp_path / "data")
    calls = tmp_path / "calls"
    kept = tmp_path / "kept"

    def score(num_workers: int) -> list[float]:
        calls.mkdir()
        actors = ActorPool(num_workers, num_workers, 1.0, 0.0)
        notes = BatchNotes(tmp_path / "notes")
        with connected(ClusterConfig()):  # rows keep their order
            table = score_rows(
                tmp_path / "data", [Counted(calls)], actors, batch_size=8, notes=notes, kept=kept
            )
        values: list[float] = table["score"].to_pylist()
        return values

    expected = [float(one) for one in ids]
    assert score(2) == expected
    first = sorted(path.name for path in calls.iterdir())
    for path in sorted(kept.glob("*.parquet"))[::3]:
        path.unlink()
    num_lost = len(first) - len(list(kept.glob("*.parquet")))
    calls.rename(tmp_path / "first")

    assert ray.is_initialized()
    assert score(1) == expected
    assert 0 < num_lost < len(first)
    again = [path.name for path in calls.iterdir()]
    assert len(again) == num_lost
    assert set(again) <= set(first)
