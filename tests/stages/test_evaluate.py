"""Stage evaluate of a finished run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from madpo_ray.artifacts.tables import read_split, write_table
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.evaluation.measures import preference_metrics
from madpo_ray.evaluation.sampling import Sampler
from madpo_ray.models.loading import load_policy
from madpo_ray.stages import evaluate, margins, train
from support.reference import with_reference

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

Run = tuple[Config, list[str]]


def evaluation(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (evaluate.STAGE.folder(config) / "evaluation.json").read_text()
    )
    return found


def test_numbers_are_those_of_the_policy(finished_run: Run) -> None:
    """Recomputed from the exported policy and the stored reference, in one process."""
    config, _ = finished_run
    names = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "margin")
    test = read_split(margins.STAGE.rows(config), "test", (*names, *config.score_columns))
    folder = train.STAGE.folder(config) / "model"
    policy = with_reference(test, folder, config.model)
    stored = read_split(
        margins.STAGE.rows(config), "test", ("ref_chosen_logps", "ref_rejected_logps")
    )
    for side in ("chosen", "rejected"):
        test = test.append_column(f"policy_{side}_logps", policy[f"ref_{side}_logps"])
        test = test.append_column(f"ref_{side}_logps", stored[f"ref_{side}_logps"])
    expected = preference_metrics(test, config.score_columns)
    found = evaluation(config)
    for name in ("reference", "policy", "implicit", "reward_model"):
        assert found[name]["accuracy"] == expected[name]["accuracy"]
        correlation = expected[name]["rank_correlation"]
        assert found[name]["rank_correlation"] == pytest.approx(correlation, abs=1e-3)
    assert found["kl_samples"] == 4
    assert [len(found["samples"][name]) for name in ("before", "after")] == [2, 2]


def test_empty_test_split_is_refused(finished_run: Run, tmp_path: Path) -> None:
    config, _ = finished_run
    rows = read_split(margins.STAGE.rows(config), "train", ("pair_id", "split"))
    moved = config.model_copy(
        update={"run": config.run.model_copy(update={"storage_path": str(tmp_path)})}
    )
    write_table(rows, margins.STAGE.rows(moved))
    with pytest.raises(UserError, match="split test has no pairs"):
        evaluate.STAGE.check_upstream(moved)


def sampler(config: Config, seed: int = 0) -> Sampler:
    folder = Path(config.model.model_name_or_path)
    return Sampler(
        policies={"sampled": folder},
        model=config.model,
        max_new_tokens=12,
        seed=seed,
        num_threads=1,
    )


def prompts(*ids: list[int], first: int = 0) -> pa.Table:
    return pa.table({"index": range(first, first + len(ids)), "prompt_ids": list(ids)})


def test_padding_changes_no_distribution(config: Config) -> None:
    """A prompt alone and next to a longer one: the same most likely first token."""
    model: Any = load_policy(Path(config.model.model_name_or_path), config.model).eval()
    short, long = [5, 6], [7, 8, 9, 10, 11]
    ids = torch.tensor([[0, 0, 0, *short], long])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[0, 5:]
    alone = model.generate(
        input_ids=torch.tensor([short]), attention_mask=torch.ones(1, 2), **options
    )[0, 2:]
    assert together.tolist() == alone.tolist()


def test_samples_follow_seed_and_index(config: Config) -> None:
    """Two batches of one prompt differ; the same batch again does not."""
    one = sampler(config)
    first = one(prompts([5, 6], [7, 8, 9]))["sampled_ids"].to_pylist()
    assert one(prompts([5, 6], [7, 8, 9]))["sampled_ids"].to_pylist() == first
    assert one(prompts([5, 6], [7, 8, 9], first=2))["sampled_ids"].to_pylist() != first
    assert sampler(config, seed=1)(prompts([5, 6], [7, 8, 9]))["sampled_ids"].to_pylist() != first


def test_samples_end_with_eos(config: Config) -> None:
    """It is part of the response, and nothing after it is."""
    many = sampler(config)(prompts(*[[5, 6]] * 200))["sampled_ids"].to_pylist()
    ended = [ids for ids in many if len(ids) < 12]
    assert ended
    assert all(ids.index(2) == len(ids) - 1 for ids in ended)
