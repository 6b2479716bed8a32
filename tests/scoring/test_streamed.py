"""Scores on the disk become the columns that a training reads."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from madpo_ray.artifacts.tables import write_table
from madpo_ray.columns import PAIR_ID, REASON, REF_LOGPS, REWARDS
from madpo_ray.config import ActorPool, ForwardOptions, ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.scoring import streamed as streamed_module
from madpo_ray.scoring.chunks import ScoredChunks
from madpo_ray.scoring.judges import FunctionReward
from madpo_ray.scoring.scaling import Scaling
from madpo_ray.scoring.scorers import PolicyLogps
from madpo_ray.scoring.streamed import StreamedScores

IDS = ["a", "b", "c"]
OWN = pa.table({PAIR_ID: IDS, "score": [3.0, 2.0, 1.0]})
REWARDED = pa.table({PAIR_ID: IDS, REWARDS[0]: [4.0, 6.0, 8.0], REWARDS[1]: [2.0, 8.0, 2.0]})
REFERENCE = pa.table({PAIR_ID: IDS, REF_LOGPS[0]: [-1.0, -2.0, -3.0], REF_LOGPS[1]: [-4.0] * 3})
NONE = pa.nulls(3, pa.string())
ACTORS = ActorPool(1, 1, 1.0, 0.0)


def reference(folder: Path) -> PolicyLogps:
    model = ModelConfig(model_name_or_path="none")
    return PolicyLogps(folder, model, columns=REF_LOGPS, forward=ForwardOptions(1))


def half_streamed(folder: Path, **options: Any) -> StreamedScores:
    """The reference's numbers are streamed, the rewards are done."""
    return StreamedScores(
        kept=folder / "kept",
        actors=ACTORS,
        batch_size=8,
        scorers=(reference(folder),),
        finished=(folder / "reward",),
        **options,
    )


def test_scored_and_finished_numbers_come_together(tmp_path: Path) -> None:
    """In any order of the pairs."""
    write_table(REWARDED.append_column(REASON, NONE), tmp_path / "reward")
    chunks = ScoredChunks(tmp_path / "kept", REF_LOGPS)
    scored = REFERENCE.append_column(REASON, NONE)
    chunks.write(scored.slice(1))
    chunks.write(scored.slice(0, 1))
    streamed = half_streamed(tmp_path, scaling=Scaling(2.0))
    complete = streamed.complete(OWN.take([2, 0, 1]))
    assert complete[PAIR_ID].to_pylist() == ["c", "a", "b"]
    assert complete["margin"].to_pylist() == [3.0, 1.0, -1.0]
    assert complete[REF_LOGPS[0]].to_pylist() == [-3.0, -1.0, -2.0]
    assert streamed.stored(OWN)[REWARDS[0]].to_pylist() == [4.0, 6.0, 8.0]  # in their own units
    assert streamed.columns == (*REF_LOGPS, "margin")


def test_pairs_without_scores_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedScores(tmp_path / "kept", ACTORS, 8, (reference(tmp_path),))
    monkeypatch.setattr(streamed_module, "LISTING_S", 0)
    with pytest.raises(RuntimeError, match="3 pairs have no scores, such as a"):
        streamed.complete(OWN)
    scored = REFERENCE.append_column(REASON, NONE)
    ScoredChunks(tmp_path / "kept", REF_LOGPS).write(scored.slice(0, 2))
    with pytest.raises(RuntimeError, match="1 pairs have no scores, such as c"):
        streamed.complete(OWN)


def test_pairs_that_failed_are_counted_once(tmp_path: Path) -> None:
    """By whichever scorer; too many of them are refused."""
    some = pa.array(["rewards are nan", None, None])
    write_table(REWARDED.append_column(REASON, some), tmp_path / "reward")
    raised = pa.array(["raised ValueError: no", "raised ValueError: no", None])
    ScoredChunks(tmp_path / "kept", REF_LOGPS).write(REFERENCE.append_column(REASON, raised))
    streamed = half_streamed(tmp_path, max_reject_fraction=0.7)
    ids = OWN[PAIR_ID]
    assert streamed.count_failures(ids) == 2
    assert streamed.count_failures(ids.slice(2)) == 0
    strict = dataclasses.replace(streamed, max_reject_fraction=0.6)
    with pytest.raises(UserError, match="2 of 3 pairs cannot be scored"):
        strict.count_failures(ids)
    untried = dataclasses.replace(strict, kept=tmp_path / "empty")
    assert untried.count_failures(ids) == 0  # not tried by all scorers


def test_margin_of_the_data(tmp_path: Path) -> None:
    write_table(REFERENCE.append_column(REASON, NONE), tmp_path / "reference")
    streamed = StreamedScores(
        tmp_path / "kept",
        ACTORS,
        8,
        (),
        finished=(tmp_path / "reference",),
        source_columns=("score",),
        scaling=Scaling(0.5),
    )
    assert streamed.complete(OWN)["margin"].to_pylist() == [6.0, 4.0, 2.0]


def test_without_rewards_there_are_no_margins(tmp_path: Path) -> None:
    write_table(REFERENCE.append_column(REASON, NONE), tmp_path / "reference")
    streamed = StreamedScores(tmp_path / "kept", ACTORS, 8, (), finished=(tmp_path / "reference",))
    assert streamed.complete(OWN).column_names == [PAIR_ID, "score", *REF_LOGPS]


def test_texts_come_if_a_scorer_reads_them(tmp_path: Path) -> None:
    tokens = StreamedScores(tmp_path, ACTORS, 8, (reference(tmp_path),))
    texts = StreamedScores(
        tmp_path, ACTORS, 8, (reference(tmp_path), FunctionReward("a:b", key="reward.source"))
    )
    assert tokens.text_columns == ()
    assert texts.text_columns == ("prompt", "chosen", "rejected")
