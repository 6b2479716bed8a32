"""Stage evaluate of a finished run."""

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import feather
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from madpo_ray import pipeline
from madpo_ray.artifacts.tables import read_split
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.evaluation.measures import preference_metrics
from madpo_ray.evaluation.sample_sets import PolicyFiles
from madpo_ray.evaluation.sampling import Sampler, end_tokens
from madpo_ray.models.loading import load_policy
from madpo_ray.stages import evaluate, margins, pairs, reward, sft, train
from madpo_ray.stages.other_runs import find_policy
from support.judges import count_kind_words
from support.models import make_model, make_reward_model, make_tokenizer
from support.pairs import make_rows, write_jsonl
from support.reference import with_reference

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.usefixtures("ray_local")]

Run = tuple[Config, list[str]]
ROWS = make_rows(40)


def evaluation(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (evaluate.STAGE.folder(config) / "evaluation.json").read_text()
    )
    return found


def test_numbers_are_those_of_the_policy(finished_run: Run) -> None:
    """Recomputed from the exported policy and the stored reference, in one process."""
    config, _ = finished_run
    names = ("pair_id", "group_hash", "prompt_ids", "chosen_ids", "rejected_ids", "margin")
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
    by_margin = found["implicit"]["by_margin"]
    assert sum(one["pairs"] for one in by_margin) == found["test_pairs"]
    assert [len(found["samples"][name]) for name in ("before", "after")] == [2, 2]


def test_samples_are_judged_at_each_temperature(finished_run: Run) -> None:
    config, _ = finished_run
    found = evaluation(config)
    entries = {(one["policy"], one["temperature"]): one for one in found["sampling"]}
    assert list(entries) == list(itertools.product(["policy", "reference"], [1.0, 0.0]))
    folder = evaluate.STAGE.folder(config)
    samples = pq.read_table(folder / "samples.parquet")
    assert samples.num_rows == 4
    for (policy, temperature), one in entries.items():
        texts = samples[f"{policy}@{temperature:g}"].to_pylist()
        assert one["reward"]["mean"] == pytest.approx(np.mean(count_kind_words([], texts)))
        assert ("win_rate" in one) is (policy == "policy")
        assert (one["kl"] < 1e-6) is (policy == "reference" and temperature == 1)
    # Greedy samples of a prompt are alike.
    greedy = samples["policy@0"].to_pylist()
    assert greedy[:2] == greedy[2:]
    assert found["comparisons"] == []
    # Two prompts, each sampled twice.
    assert [pair_id[-1] for pair_id in samples["pair_id"].to_pylist()] == ["0", "0", "1", "1"]
    assert samples["prompt"].to_pylist()[:2] == samples["prompt"].to_pylist()[2:]
    assert len(set(samples["prompt"].to_pylist())) == 2
    # Nothing was trained or calibrated on them.
    held_out = read_split(pairs.STAGE.rows(config), "test", ["prompt"])["prompt"].to_pylist()
    assert set(samples["prompt"].to_pylist()) <= set(held_out)
    lines = (folder / "samples.csv").read_text().splitlines()
    assert len(lines) == 5
    assert "reward,reward_low,reward_high" in lines[0]
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert pictures == {"reward_by_temperature.png", "frontier.png"}


def test_divergence_is_that_of_plain_forwards(finished_run: Run) -> None:
    """Summed over the samples' tokens from full logits of one text at a time."""
    config, _ = finished_run
    reference_folder = Path(config.model.model_name_or_path)
    policy, reference = (
        load_policy(folder, config.model, base=reference_folder).eval()
        for folder in (train.STAGE.model(config), reference_folder)
    )
    samples = pq.read_table(evaluate.STAGE.folder(config) / "samples.parquet").to_pylist()
    for row in samples:
        ids, response = row["prompt_ids"] + row["policy@1_ids"], row["policy@1_ids"]
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=torch.tensor([ids])).logits[0, -len(response) - 1 : -1]
                for model in (policy, reference)
            )
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        expected = (ours.exp() * (ours - theirs)).sum()
        assert row["policy@1_kl"] == pytest.approx(float(expected), abs=1e-4)
        ratio = (ours - theirs).gather(1, torch.tensor(response)[:, None]).sum()
        assert row["policy@1_logratio"] == pytest.approx(float(ratio), abs=1e-4)
    entries = evaluation(config)["sampling"]
    mean = np.mean([row["policy@1_kl"] for row in samples])
    assert entries[0]["kl"] == pytest.approx(mean)


@pytest.mark.slow
def test_classifier_is_a_judge(finished_run: Run, tmp_path: Path) -> None:
    """Such as a reward model that was trained here, as transformers scores the same texts."""
    config, _ = finished_run
    shutil.copytree(config.run.folder, tmp_path / "tiny")
    judge = shutil.copytree(reward.STAGE.folder(config) / "model", tmp_path / "judge")
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(tmp_path)
    raw["evaluate"] |= {"judge": str(judge), "temperatures": [1.0]}
    changed = parse_config(raw)
    pipeline.run_stage(changed, evaluate.STAGE, say=lambda what: None)
    (entry, _) = evaluation(changed)["sampling"]

    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    samples = pq.read_table(evaluate.STAGE.folder(changed) / "samples.parquet").to_pylist()
    rewards = []
    for row in samples:
        ids = tokenizer(row["prompt"] + row["policy@1"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            rewards.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    assert [row["policy@1_reward"] for row in samples] == pytest.approx(rewards, abs=1e-4)
    assert entry["reward"]["mean"] == pytest.approx(np.mean(rewards), abs=1e-4)


def test_runs_are_compared(finished_run: Run, tmp_path: Path) -> None:
    """A copy of the run is as good as the run."""
    config, _ = finished_run
    for name in ("this", "twin"):
        shutil.copytree(config.run.folder, tmp_path / name)
    raw = config.model_dump(mode="json")
    raw["run"] = {**raw["run"], "name": "this", "storage_path": str(tmp_path)}
    raw["evaluate"]["compare_with"] = [str(tmp_path / "twin")]
    this = parse_config(raw)
    assert [stage.name for stage in pipeline.pending(this)] == ["evaluate"]
    pipeline.run_stage(this, evaluate.STAGE, say=lambda what: None)
    compared = [one for one in evaluation(this)["comparisons"] if one["against"] == "twin"]
    assert [one["temperature"] for one in compared] == [1.0, 0.0]
    for one in compared:
        assert one["reward_difference"] == {"mean": 0.0, "interval": [0.0, 0.0]}
        assert one["win_rate"]["mean"] == one["length_controlled_win_rate"] == 0.5


def test_adapter_of_a_run_keeps_its_base(finished_run: Run, tmp_path: Path) -> None:
    """Another model of the same shapes would be evaluated without a word."""
    config, _ = finished_run
    shutil.copytree(config.run.folder, tmp_path / "twin")
    (tmp_path / "twin" / "train" / "model" / "adapter_config.json").write_text("{}")
    found = find_policy(tmp_path / "twin", config)
    assert found.base == Path(config.model.model_name_or_path)
    manifest = tmp_path / "twin" / "train" / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["inputs"]["content"]["initial_policy"] = "another"
    manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="twin was trained from is gone or was made again"):
        find_policy(tmp_path / "twin", config)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["empty"], "empty has no finished training"),
        (["a/x", "b/x"], "folders need different names"),
        (["policy"], "folders need different names"),
    ],
)
def test_rejects_bad_compare_with(
    folders: list[str], message: str, config: Config, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    raw = config.model_dump(mode="json")
    raw["evaluate"]["compare_with"] = [str(tmp_path / folder) for folder in folders]
    with pytest.raises(UserError, match=message):
        evaluate.STAGE.check(parse_config(raw))


def test_rejects_missing_judge(config: Config, tmp_path: Path) -> None:
    raw = config.model_dump(mode="json")
    for judge, message in (
        ("support.judges:nobody", r"evaluate\.judge: support.judges:nobody cannot be"),
        (str(tmp_path / "gone"), r"evaluate\.judge: .*gone is not a folder with a config\.json"),
    ):
        raw["evaluate"]["judge"] = judge
        with pytest.raises(UserError, match=message):
            evaluate.STAGE.check(parse_config(raw))


def test_rejects_judge_with_two_labels(config: Config, tmp_path: Path) -> None:
    """At the start, not after the policies were sampled."""
    model = make_reward_model(num_labels=2)
    model.save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    raw = config.model_dump(mode="json")
    raw["evaluate"]["judge"] = str(tmp_path / "judge")
    with pytest.raises(UserError, match=r"weights are of another shape \(score.weight\)"):
        evaluate.STAGE.check(parse_config(raw))


def test_rejects_samples_beyond_the_models_positions(finished_run: Run) -> None:
    raw = finished_run[0].model_dump(mode="json")
    raw["evaluate"]["max_new_tokens"] = 256
    with pytest.raises(UserError, match=r"evaluate\.max_new_tokens: .* 256 positions"):
        evaluate.STAGE.check(parse_config(raw))


def test_moved_judge_is_the_same_judge(finished_run: Run, tmp_path: Path) -> None:
    raw = finished_run[0].model_dump(mode="json")
    fingerprints = []
    for name in ("here", "there"):
        folder = tmp_path / name / "judge"
        make_reward_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        raw["evaluate"]["judge"] = str(folder)
        fingerprints.append(evaluate.STAGE.inputs(parse_config(raw)).fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_samples_are_kept_if_the_judge_fails(finished_run: Run, tmp_path: Path) -> None:
    """Another judge gets the same samples, which are not drawn again."""
    config, _ = finished_run
    shutil.copytree(config.run.folder, tmp_path / config.run.name)
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(tmp_path)
    raw["evaluate"]["judge"] = "support.judges:fail_always"
    with pytest.raises(UserError, match=r"4 of 4 rows could .*: nothing suits"):
        pipeline.run_stage(parse_config(raw), evaluate.STAGE, say=lambda what: None)
    (kept,) = (tmp_path / config.run.name / "ray").glob("evaluate-*/kept/samples.arrow")
    marked = feather.read_table(kept)
    marked = marked.set_column(
        marked.column_names.index("policy@1"), "policy@1", pa.array(["good"] * 4)
    )
    feather.write_feather(marked, kept)
    raw["evaluate"]["judge"] = "support.judges:want_good"
    corrected = parse_config(raw)
    pipeline.run_stage(corrected, evaluate.STAGE, say=lambda what: None)
    assert evaluation(corrected)["sampling"][0]["reward"]["mean"] == 1.0
    assert not kept.exists()


def test_empty_test_split_is_refused_early(raw_config: dict[str, Any]) -> None:
    """Before the first stage, if no pair can be in it."""
    raw_config["data"]["test_fraction"] = 0.0
    with pytest.raises(UserError, match="split test has no pairs"):
        pipeline.run_all(parse_config(raw_config), say=lambda what: None)


def test_empty_test_split_is_refused_after_pairs(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """As soon as it is known: nothing is trained."""
    rows = [{**row, "part": "validation" if i % 4 else "train"} for i, row in enumerate(ROWS)]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    raw_config["data"] |= {"files": [str(file)], "split_column": "part"}
    config = parse_config(raw_config)
    with pytest.raises(UserError, match="split test has no pairs"):
        pipeline.run_all(config, say=lambda what: None)
    assert pairs.STAGE.is_finished(config)
    assert not sft.STAGE.folder(config).exists()


def sampler(config: Config, seed: int = 0) -> Sampler:
    folder = Path(config.model.model_name_or_path)
    return Sampler(
        policies={"sampled": PolicyFiles(folder, folder)},
        model=config.model,
        temperatures=[1.0],
        max_new_tokens=12,
        seed=seed,
        num_threads=1,
    )


def prompts(*ids: list[int], first: int = 0) -> pa.Table:
    return pa.table({"index": range(first, first + len(ids)), "prompt_ids": list(ids)})


def test_padding_changes_no_sample(config: Config) -> None:
    """A prompt first in its batch, by itself and next to longer ones: the same draws."""
    one = sampler(config)
    short, long = [5, 6], [7, 8, 9, 10, 11]
    by_itself = one(prompts(short, short))["sampled@1_ids"].to_pylist()
    padded = one(prompts(short, long))["sampled@1_ids"].to_pylist()
    assert padded[0] == by_itself[0]


def test_samples_follow_seed_and_index(config: Config) -> None:
    """Two batches of one prompt differ; the same batch again does not."""
    one = sampler(config)
    first = one(prompts([5, 6], [7, 8, 9]))["sampled@1_ids"].to_pylist()
    assert one(prompts([5, 6], [7, 8, 9]))["sampled@1_ids"].to_pylist() == first
    assert one(prompts([5, 6], [7, 8, 9], first=2))["sampled@1_ids"].to_pylist() != first
    assert sampler(config, seed=1)(prompts([5, 6], [7, 8, 9]))["sampled@1_ids"].to_pylist() != first


def test_samples_are_of_the_models_distribution(config: Config) -> None:
    """The mean log-prob of first tokens is minus the entropy: at temperature 0.7 it is higher."""
    folder = Path(config.model.model_name_or_path)
    one = Sampler(
        policies={"sampled": PolicyFiles(folder, folder)},
        model=config.model,
        temperatures=[1.0],
        max_new_tokens=1,
        seed=0,
        num_threads=1,
    )
    tokens = one(prompts(*[[5, 6]] * 4000))["sampled@1_ids"].to_pylist()
    policy = load_policy(folder, config.model).eval()
    with torch.no_grad():
        logps = policy(input_ids=torch.tensor([[5, 6]])).logits[0, -1].log_softmax(-1)
    drawn = logps[torch.tensor(tokens)[:, 0]]
    entropy = torch.distributions.Categorical(logits=logps).entropy()
    assert drawn.mean() == pytest.approx(float(-entropy), abs=float(4 * drawn.std() / 4000**0.5))
    warm = torch.distributions.Categorical(logits=logps / 0.7)
    assert (warm.probs * logps).sum() > drawn.mean() + 10 * drawn.std() / 4000**0.5


def test_end_tokens_are_of_all_places(tokenizer: Any) -> None:
    """Config and generation config may name others than the tokenizer."""
    model = make_model()
    assert end_tokens(tokenizer, model) == {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [2, 10]
    model.config.eos_token_id = 11
    assert end_tokens(tokenizer, model) == {2, 10, 11}


def test_end_of_the_templates_turn_is_an_end_token(tokenizer: Any) -> None:
    """A chat model's own end token may be that of documents."""
    turns = copy.deepcopy(tokenizer)
    turns.eos_token = "<|pad|>"
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert end_tokens(turns, model) == {0}
    turns.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert end_tokens(turns, model) == {0, 2}
    turns.chat_template = None
    assert end_tokens(turns, model) == {0}


def test_samples_end_with_eos(config: Config) -> None:
    """It is part of the response, and nothing after it is."""
    many = sampler(config)(prompts(*[[5, 6]] * 200))["sampled@1_ids"].to_pylist()
    ended = [ids for ids in many if len(ids) < 12]
    assert ended
    assert all(ids.index(2) == len(ids) - 1 for ids in ended)
