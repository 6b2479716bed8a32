"""All stages on two workers, once; what they leave behind; and what a second call does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset
import pytest
import torch
from conftest import TEMPLATE, make_model, make_tokenizer

from madpo_ray import evaluate, margins, pairs, pipeline, reward, sft, train
from madpo_ray.batching import collate
from madpo_ray.config import Config, UserError
from madpo_ray.config_file import load_config, parse_config
from madpo_ray.logprobs import PairLogps
from madpo_ray.metrics import read_metrics
from madpo_ray.models import load_policy
from madpo_ray.tables import parquet_folder, read_split

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]


def test_every_stage_ran_and_said_its_seconds(finished_run: tuple[Config, list[str]]) -> None:
    for stage in pipeline.stages_of(finished_run[0]):
        assert any(line.startswith(f"{stage.name}: ") and line.endswith(" s") for line in finished_run[1])


def test_margins_hold_every_pair_once(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    ids = [
        pyarrow.dataset.dataset(str(parquet_folder(stage(config))), format="parquet")
        .to_table(columns=["pair_id"])["pair_id"]
        .to_pylist()
        for stage in (pairs.folder, margins.folder)
    ]
    assert len(ids[0]) == len(set(ids[0])) == 90
    assert ids[1] == ids[0]


def test_margins_are_differences_of_rewards_in_calibrated_units(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    columns = ("margin", "chosen_reward", "rejected_reward")
    table = read_split(parquet_folder(margins.folder(config)), "train", columns)
    assert pc.subtract(table["chosen_reward"], table["rejected_reward"]).to_pylist() == table["margin"].to_pylist()
    results = pipeline.results(config, pipeline.STAGES["reward"])
    assert results["accuracy"] > 0.6
    assert results["temperature"] not in (None, 1.0)


def test_saved_reward_model_scores_the_same_in_plain_transformers(finished_run: tuple[Config, list[str]]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config, _ = finished_run
    folder = reward.folder(config) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    temperature = pipeline.results(config, pipeline.STAGES["reward"])["temperature"]
    columns = ("prompt_ids", "chosen_ids", "chosen_reward")
    rows = read_split(parquet_folder(margins.folder(config)), "test", columns).slice(0, 4).to_pylist()
    texts = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        scores = model(**padded).logits[:, 0] / temperature
    torch.testing.assert_close(scores, torch.tensor([row["chosen_reward"] for row in rows]), rtol=1e-4, atol=1e-5)


def test_stored_reference_log_probs_are_the_models_own(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    rows = read_split(parquet_folder(margins.folder(config)), "train", names).slice(0, 6).to_pylist()
    policy = load_policy(sft.start_folder(config), config.model).eval()
    with torch.no_grad():
        logps = PairLogps(policy)(collate(rows, shared_prefix=False))["logps"]
    stored = [row[f"ref_{side}_logps"] for side in ("chosen", "rejected") for row in rows]
    torch.testing.assert_close(logps.double(), torch.tensor(stored, dtype=torch.float64), rtol=0, atol=1e-4)


def test_metrics_have_the_names_of_the_field(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    lines = read_metrics(train.folder(config) / "metrics.jsonl")
    logged = {name for line in lines for name in line}
    for name in (
        *("loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("rewards/accuracies", "logps/chosen", "logps/rejected", "entropy", "num_tokens", "margin/mean"),
        *("margin/negative_fraction", "weight/mean", "weight/min", "weight/max", "weight/effective_sample_size"),
        *("tokens_per_second", "pairs_per_second", "peak_memory_bytes", "mfu", "eval_loss", "eval_rewards/accuracies"),
    ):
        assert name in logged, name
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward", "eval_accuracy"} <= {
        name for line in read_metrics(reward.folder(config) / "metrics.jsonl") for name in line
    }
    assert list((train.folder(config) / "tensorboard").glob("events*"))


def test_the_first_step_starts_from_the_reference(finished_run: tuple[Config, list[str]]) -> None:
    first = read_metrics(train.folder(finished_run[0]) / "metrics.jsonl")[0]
    assert abs(first["rewards/margins"]) < 1e-6
    assert abs(first["rewards/chosen"]) < 1e-6


def test_the_policy_loads_in_another_process(finished_run: tuple[Config, list[str]]) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(m(**t('the film', return_tensors='pt')).logits.shape[-1])"
    )
    folder = str(train.folder(finished_run[0]) / "model")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "400", done.stderr


def test_evaluation_has_its_table(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    results = json.loads((evaluate.folder(config) / "evaluation.json").read_text())
    for name in ("reference", "policy", "implicit", "reward_model"):
        low, high = results[name]["accuracy_interval"]
        assert 0 <= low <= results[name]["accuracy"] <= high <= 1
        assert -1 <= results[name]["rank_correlation"] <= 1
    assert results["kl_samples"] == 4
    assert len(results["samples"]["before"]) == len(results["samples"]["after"]) == 2


def test_a_second_call_does_nothing_but_say_so(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in config.run.folder.rglob("*") if path.is_file()}
    said: list[str] = []
    pipeline.run_all(config, say=lambda what: said.append(str(what)))
    assert said == [f"nothing to do: every stage in {config.run.folder} is done for this config"]
    assert {path: path.stat().st_mtime_ns for path in config.run.folder.rglob("*") if path.is_file()} == before


def test_a_changed_config_names_the_first_stage_and_why(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    changed = config.model_copy(update={"train": config.train.model_copy(update={"beta": 0.3})})
    assert [stage.name for stage in pipeline.pending(changed)] == ["train", "evaluate"]
    said: list[str] = []
    pipeline._say_why(changed, pipeline.pending(changed)[0], said.append)
    assert said == ["train: redone, and what follows from it, because of\n  settings.train.beta: 0.1 -> 0.3"]
    reported = config.model_copy(update={"train": config.train.model_copy(update={"logging_steps": 7})})
    assert pipeline.pending(reported) == []


def template(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(TEMPLATE + " ")
    raw["model"]["chat_template_path"] = str(tmp_path / "other.jinja")


def weights(raw: dict[str, Any], tmp_path: Path) -> None:
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    raw["model"]["model_name_or_path"] = str(tmp_path / "other")


def at(section: str, key: str, value: Any) -> Callable[[dict[str, Any], Path], None]:
    return lambda raw, tmp_path: raw[section].update({key: value})


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        (template, "pairs"),
        (weights, "pairs"),
        (at("data", "max_length", 32), "pairs"),
        (at("run", "seed", 1), "pairs"),
        (at("model", "dtype", "bfloat16"), "reward"),
        (at("reward", "learning_rate", 1e-4), "reward"),
        (at("margins", "calibrate", False), "margins"),
        (at("train", "tau", 3.0), "train"),
        (at("evaluate", "num_samples", 8), "evaluate"),
        (at("train", "eval_steps", 2), None),
        (at("reward", "per_device_eval_batch_size", 3), None),
        (at("cluster", "num_workers", 1), None),
    ],
)
def test_what_changes_the_numbers_is_redone_from_its_stage(
    edit: Callable[[dict[str, Any], Path], None],
    first: str | None,
    finished_run: tuple[Config, list[str]],
    tmp_path: Path,
) -> None:
    raw = finished_run[0].model_dump(mode="json")
    edit(raw, tmp_path)
    todo = [stage.name for stage in pipeline.pending(parse_config(raw))]
    names = [stage.name for stage in pipeline.stages_of(finished_run[0])]
    assert todo == (names[names.index(first) :] if first else [])


def test_a_section_sft_moves_what_starts_from_the_model(finished_run: tuple[Config, list[str]]) -> None:
    raw = finished_run[0].model_dump(mode="json")
    raw["sft"] = {}
    config = parse_config(raw)
    assert [stage.name for stage in pipeline.pending(config)] == ["sft", "reward", "margins", "train", "evaluate"]
    # The reward model does not start from there: its artifact still fits.
    assert reward.inputs(config) == reward.inputs(finished_run[0])
    assert margins.inputs(config) != margins.inputs(finished_run[0])
    with pytest.raises(UserError, match="run `madpo-ray sft` first"):
        sft.start_folder(config)


def test_a_stage_refuses_inputs_made_otherwise(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    changed = config.model_copy(update={"reward": config.reward.model_copy(update={"num_train_epochs": 1})})
    with pytest.raises(UserError, match="made from other inputs"):
        pipeline.run_stage(changed, pipeline.STAGES["margins"], say=lambda what: None)


def test_changed_files_under_the_same_config_are_refused(
    finished_run: tuple[Config, list[str]], pairs_file: Path
) -> None:
    config, _ = finished_run
    content = pairs_file.read_text()
    try:
        pairs_file.write_text(content + content.splitlines()[0] + "\n")
        with pytest.raises(UserError, match=r"give another run\.name"):
            pipeline.run_all(config, say=lambda what: None)
    finally:
        pairs_file.write_text(content)
    assert pipeline.pending(config) == []


def test_the_resolved_config_lies_beside_the_results(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    assert load_config(config.run.folder / "config.yaml") == config
