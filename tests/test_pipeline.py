"""All stages on two workers, once; what they write; and what a second call does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from madpo_ray import pipeline
from madpo_ray.artifacts.manifest import Difference, differences
from madpo_ray.config import Config, load_config, parse_config
from madpo_ray.errors import Stopped, UserError
from madpo_ray.stages import evaluate, margins, pairs, reward, sft, train
from madpo_ray.training.metrics import read_metrics
from support.locks import hold_elsewhere
from support.models import TEMPLATE, make_model, make_tokenizer
from support.pairs import make_rows, tiny_run, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]

Run = tuple[Config, list[str]]
Edit = Callable[[dict[str, Any], Path], None]


def ignore(what: object) -> None:
    """Prints nothing."""


def test_every_stage_reports_its_seconds(finished_run: Run) -> None:
    config, printed = finished_run
    for stage in pipeline.wanted_stages(config):
        own = [line for line in printed if line.startswith(f"{stage.name}: ")]
        assert any(line.endswith(" s") for line in own)


def test_logs_trls_metrics(finished_run: Run) -> None:
    """TRL's, and ours next to them."""
    config, _ = finished_run
    lines = read_metrics(train.STAGE.folder(config) / "metrics.jsonl")
    logged = {name for line in lines for name in line}
    expected = """
        loss grad_norm learning_rate epoch rewards/chosen rewards/rejected rewards/margins
        rewards/accuracies logps/chosen logps/rejected entropy num_tokens margin/mean
        margin/negative_fraction weight/mean weight/min weight/max weight/effective_sample_size
        tokens_per_second pairs_per_second peak_memory_bytes mfu eval_loss eval_rewards/accuracies
    """
    assert set(expected.split()) <= logged
    assert list((train.STAGE.folder(config) / "tensorboard").glob("events*"))

    reward_lines = read_metrics(reward.STAGE.folder(config) / "metrics.jsonl")
    reward_logged = {name for line in reward_lines for name in line}
    expected = "accuracy margin mean_reward min_reward max_reward eval_accuracy"
    assert set(expected.split()) <= reward_logged


def test_selectable_metrics_are_measured(finished_run: Run) -> None:
    """metric_for_best_model accepts only names that an evaluation measures."""
    config, _ = finished_run
    for stage, settings in ((train.STAGE, config.train), (reward.STAGE, config.reward)):
        lines = read_metrics(stage.folder(config) / "metrics.jsonl")
        measured = {
            name.removeprefix("eval_") for line in lines for name in line if "eval_" in name
        }
        assert settings.metrics <= measured


def test_first_step_starts_from_the_reference(finished_run: Run) -> None:
    first = read_metrics(train.STAGE.folder(finished_run[0]) / "metrics.jsonl")[0]
    assert abs(first["rewards/margins"]) < 1e-6
    assert abs(first["rewards/chosen"]) < 1e-6


def test_policy_loads_in_another_process(finished_run: Run) -> None:
    """In plain transformers."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(m(**t('the film', return_tensors='pt')).logits.shape[-1])"
    )
    folder = str(train.STAGE.folder(finished_run[0]) / "model")
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "400", done.stderr


def test_second_call_does_nothing(finished_run: Run) -> None:
    config, _ = finished_run

    def files() -> dict[Path, int]:
        paths = config.run.folder.rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}

    before = files()
    printed: list[str] = []
    pipeline.run_all(config, say=lambda what: printed.append(str(what)))
    folder = config.run.folder
    assert printed == [f"nothing to do: every stage in {folder} is done for this config"]
    assert files() == before


def test_moved_run_and_data_are_not_redone(finished_run: Run, tmp_path: Path) -> None:
    """Copied, or reached through another mount point: only contents count."""
    config, _ = finished_run
    raw = config.model_dump(mode="json")
    shutil.copytree(config.run.folder, tmp_path / "storage" / config.run.name)
    shutil.copytree(config.model.model_name_or_path, tmp_path / "base")
    shutil.copy(config.data.files[0], tmp_path / "other name.jsonl")
    raw["run"]["storage_path"] = str(tmp_path / "storage")
    raw["model"]["model_name_or_path"] = str(tmp_path / "base")
    raw["data"]["files"] = [str(tmp_path / "other name.jsonl")]
    assert pipeline.pending(parse_config(raw)) == []


def test_other_files_redo_pairs(finished_run: Run, tmp_path: Path) -> None:
    """The config names them, so nobody is surprised."""
    raw = finished_run[0].model_dump(mode="json")
    raw["data"]["files"] = [str(write_jsonl(tmp_path / "other.jsonl", make_rows(30)))]
    config = parse_config(raw)
    printed: list[Any] = []
    pipeline.explain_redo(config, pairs.STAGE, printed.append)
    assert "content.files[0]: " in printed[0]


def test_lost_file_redoes_its_stage(finished_run: Run, tmp_path: Path) -> None:
    config, _ = finished_run
    raw = config.model_dump(mode="json")
    shutil.copytree(config.run.folder, tmp_path / config.run.name)
    raw["run"]["storage_path"] = str(tmp_path)
    copied = parse_config(raw)
    (margins.STAGE.folder(copied) / "calibration.json").write_text("")
    assert [stage.name for stage in pipeline.pending(copied)] == ["margins"]
    printed: list[Any] = []
    pipeline.explain_redo(copied, margins.STAGE, printed.append)
    assert printed[0].startswith("margins: redone because of\n  calibration.json has 0 bytes")


def test_verify_reads_every_file(finished_run: Run, tmp_path: Path) -> None:
    config, _ = finished_run
    printed: list[Any] = []
    pipeline.verify(config.run.folder, say=printed.append)
    assert "train: intact" in printed
    assert "scores/reference: intact" in printed

    shutil.copytree(config.run.folder, tmp_path / "copy")
    weights_file = tmp_path / "copy" / "train" / "model" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(Stopped, match="files that differ from their manifests: 1"):
        pipeline.verify(tmp_path / "copy", say=printed.append)
    assert "train: model/model.safetensors has different content" in printed
    with pytest.raises(UserError, match="has no finished stage"):
        pipeline.verify(tmp_path / "nothing", say=ignore)


def test_verify_tells_what_is_of_earlier_results(finished_run: Run, tmp_path: Path) -> None:
    """Such as an export, after which margins were made again: no damage, and not up to date."""
    config, _ = finished_run
    run = tmp_path / "run"
    shutil.copytree(config.run.folder, run)
    file = run / "margins" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "another"}))
    printed: list[Any] = []
    pipeline.verify(run, say=printed.append)
    assert "margins: intact" in printed
    assert "train: intact, but made from an earlier margins" in printed


def test_verify_follows_links(finished_run: Run, tmp_path: Path) -> None:
    """A stage may be on another disk. One that lost its manifest, or is missing, is named."""
    config, _ = finished_run
    run = tmp_path / "run"
    shutil.copytree(config.run.folder, run)
    (run / "train").rename(tmp_path / "train")
    (run / "train").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "metrics.jsonl").write_text("")
    (run / "pairs" / "manifest.json").unlink()
    shutil.rmtree(run / "reward")
    printed: list[Any] = []
    with pytest.raises(Stopped, match="files that differ from their manifests: 4"):
        pipeline.verify(run, say=printed.append)
    assert "pairs: manifest.json is missing or cannot be read" in printed
    assert any(line.startswith("train: metrics.jsonl has 0 bytes") for line in printed)
    assert "margins: reward, which it was made from, is missing" in printed


def test_leftovers_of_a_kill_are_deleted(finished_run: Run, tmp_path: Path) -> None:
    """Also if every stage is finished, and the saved config is damaged."""
    config, _ = finished_run
    shutil.copytree(config.run.folder, tmp_path / config.run.name)
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(tmp_path)
    config = parse_config(raw)
    old = train.STAGE.folder(config).with_name("train.old")
    shutil.copytree(train.STAGE.folder(config), old)
    checkpoint = next(config.run.ray_folder.glob("train-*")) / "checkpoint_00000001"
    checkpoint.mkdir()
    interrupted = config.run.ray_folder / "tune-tokens-1"  # of a stage that is not finished
    interrupted.mkdir()
    config_file = config.run.folder / "config.yaml"
    config_file.write_bytes(b"\xff")
    printed: list[str] = []
    pipeline.run_all(config, say=lambda what: printed.append(str(what)))
    assert printed[-1].startswith("nothing to do")
    assert not old.exists()
    assert not checkpoint.exists()
    assert interrupted.exists()
    assert load_config(config_file) == config


def test_another_command_is_refused(finished_run: Run, tmp_path: Path) -> None:
    """Of another stage, too: it names who writes the run."""
    config, _ = finished_run
    lock = hold_elsewhere(config.run.folder)
    try:
        changed = with_train(config, beta=0.3)
        for work in (
            lambda: pipeline.run_all(changed, say=ignore),
            lambda: pipeline.run_stage(changed, train.STAGE, say=ignore),
            lambda: pairs.STAGE.run(config),
        ):
            with pytest.raises(UserError, match=f"reward by process {lock.pid} on "):
                work()
    finally:
        lock.kill()
        lock.wait()


def test_checkpoints_go_when_their_stage_is_finished(finished_run: Run) -> None:
    config, _ = finished_run
    runs = list((config.run.folder / "ray").glob("train-*"))
    assert len(runs) == 1
    assert not list(runs[0].glob("checkpoint_*"))
    assert (runs[0] / "metrics" / "metrics.jsonl").exists()
    assert not list(config.run.ray_folder.glob("*-tokens-*"))


def with_train(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def test_explains_a_redo(finished_run: Run) -> None:
    config, _ = finished_run
    changed = with_train(config, beta=0.3)
    assert [stage.name for stage in pipeline.pending(changed)] == ["train", "evaluate"]
    printed: list[Any] = []
    pipeline.explain_redo(changed, train.STAGE, printed.append)
    assert printed == ["train: redone because of\n  settings.train.beta: 0.1 -> 0.3"]


def template(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(TEMPLATE + " ")
    raw["model"]["chat_template_path"] = str(tmp_path / "other.jinja")


def weights(raw: dict[str, Any], tmp_path: Path) -> None:
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    raw["model"]["model_name_or_path"] = str(tmp_path / "other")


def at(section: str, key: str, value: Any) -> Edit:
    return lambda raw, tmp_path: raw[section].update({key: value})


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        (template, "pairs"),
        (weights, "pairs"),
        (at("data", "max_length", 32), "pairs"),
        (at("run", "seed", 1), "pairs"),
        (at("model", "dtype", "bfloat16"), "reward"),
        (at("model", "attn_implementation", "eager"), "reward"),
        (at("reward", "learning_rate", 1e-4), "reward"),
        (at("margins", "calibration", "none"), "margins"),
        (at("train", "tau", 3.0), "train"),
        (at("train", "per_device_train_batch_size", 4), "train"),
        (at("evaluate", "num_samples", 8), "evaluate"),
        (at("train", "eval_steps", 2), None),
        (at("train", "logging_steps", 7), None),
        (at("reward", "per_device_eval_batch_size", 3), None),
        (at("scoring", "batch_size", 3), None),
        (at("cluster", "num_workers", 1), None),
    ],
)
def test_redoes_from_the_stage_that_changes(
    edit: Edit, first: str | None, finished_run: Run, tmp_path: Path
) -> None:
    """What changes a stage's numbers, and nothing else, redoes it and those after it."""
    config, _ = finished_run
    raw = config.model_dump(mode="json")
    edit(raw, tmp_path)
    todo = [stage.name for stage in pipeline.pending(parse_config(raw))]
    names = [stage.name for stage in pipeline.wanted_stages(config)]
    assert todo == (names[names.index(first) :] if first else [])


def test_sft_moves_the_initial_policy(finished_run: Run) -> None:
    raw = finished_run[0].model_dump(mode="json")
    raw["sft"] = {}
    config = parse_config(raw)
    todo = [stage.name for stage in pipeline.pending(config)]
    # The reward model does not start from there: its result still fits.
    assert todo == ["sft", "margins", "train", "evaluate"]
    with pytest.raises(UserError, match="run `madpo-ray run --until sft` first"):
        sft.initial_policy(config)


def test_refuses_inputs_of_another_config(finished_run: Run) -> None:
    config, _ = finished_run
    changed = config.model_copy(
        update={"reward": config.reward.model_copy(update={"num_train_epochs": 1})}
    )
    with pytest.raises(UserError, match="made from other inputs"):
        pipeline.run_stage(changed, margins.STAGE, say=ignore)


def test_refuses_files_that_changed(finished_run: Run, pairs_file: Path) -> None:
    config, _ = finished_run
    content = pairs_file.read_text()
    try:
        pairs_file.write_text(content + content.splitlines()[0] + "\n")
        with pytest.raises(UserError, match=r"set another run\.name"):
            pipeline.run_all(config, say=ignore)
    finally:
        pairs_file.write_text(content)
    assert pipeline.pending(config) == []


def test_refuses_a_run_of_another_version(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the version as the only reason, and before anything is redone."""
    config, _ = finished_run
    monkeypatch.setattr("madpo_ray.__version__", "999")
    found = differences(pairs.STAGE.folder(config), pairs.STAGE.inputs(config))
    assert found == [Difference("package", "madpo_ray", "0.2.0", "999")]
    with pytest.raises(UserError, match=r"package\.madpo_ray: 0\.2\.0 -> 999"):
        pipeline.run_all(config, say=ignore)


def test_saves_the_resolved_config(finished_run: Run) -> None:
    config, _ = finished_run
    assert load_config(config.run.folder / "config.yaml") == config


@pytest.mark.slow
def test_dpo_needs_no_reward_model(model_folder: Path, tmp_path: Path, ray_local: None) -> None:
    """Trains none, scores only the reference, and reports no margins."""
    file = write_jsonl(tmp_path / "pairs.jsonl", make_rows(60))
    raw = tiny_run(model_folder, file, tmp_path)
    del raw["sft"], raw["reward"]
    raw["train"] |= {"loss_type": "sigmoid", "max_steps": 2}
    config = parse_config(raw)
    printed: list[str] = []
    pipeline.run_all(config, say=lambda what: printed.append(str(what)))

    assert not reward.STAGE.folder(config).exists()
    assert any("no reward model, so no margins" in line for line in printed)
    assert [path.name for path in (config.run.folder / "scores").iterdir() if path.is_dir()] == [
        "reference"
    ]
    lines = read_metrics(train.STAGE.folder(config) / "metrics.jsonl")
    assert not any(name.startswith(("margin/", "weight/")) for line in lines for name in line)
    results = json.loads((evaluate.STAGE.folder(config) / "evaluation.json").read_text())
    assert "reward_model" not in results
    assert results["sampling"][0]["samples"] == 4
