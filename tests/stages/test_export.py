"""The scored pairs as a data set that TRL's DPOTrainer takes."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from typer.testing import CliRunner

from conftest import make_policy_job
from madpo_ray import pipeline
from madpo_ray.artifacts.building import building
from madpo_ray.artifacts.tables import read_split, rows_folder, write_table
from madpo_ray.cli import app
from madpo_ray.config import Config, parse_config, save_config
from madpo_ray.errors import UserError
from madpo_ray.losses import madpo_weight
from madpo_ray.stages import export, margins
from support.models import make_model
from support.ranks import Ranks, logged

NUM_PAIRS = 16


def scored(count: int, *, messages: bool = False) -> dict[str, list[Any]]:
    """Columns of pairs as stage margins writes them."""
    texts = {
        "prompt": ("user", "say"),
        "chosen": ("assistant", "good"),
        "rejected": ("assistant", "bad"),
    }
    table: dict[str, list[Any]] = {"pair_id": [f"pair-{i}" for i in range(count)]}
    for name, (role, text) in texts.items():
        values: list[str] = [f" {text} {i}" for i in range(count)]
        if messages:
            values = [json.dumps([{"role": role, "content": text}]) for text in values]
        table[name] = values
    numbers = [i / 2 - 1 for i in range(count)]
    splits = ["validation" if i % 4 == 3 else "train" for i in range(count)]
    logps = {"ref_chosen_logps": numbers, "ref_rejected_logps": numbers}
    return table | logps | {"split": splits, "margin": numbers}


def exported(config: Config, table: dict[str, list[Any]]) -> dict[str, pa.Table]:
    """The tables by split that the stage writes for a run with these pairs."""
    with building(margins.STAGE.folder(config), margins.STAGE.inputs(config)) as (folder, _):
        write_table(pa.table(table), rows_folder(folder))
    pipeline.run_stage(config, export.STAGE, say=lambda what: None)
    files = sorted((export.STAGE.folder(config) / "data").iterdir())
    return {file.name.split("-")[0]: pq.read_table(file) for file in files}


@pytest.mark.ray
@pytest.mark.deepspeed
def test_command_exports_a_finished_run(finished_run: tuple[Config, list[str]]) -> None:
    config, _ = finished_run
    file = config.run.folder.parent / "config.yaml"
    save_config(config, file)
    called = CliRunner().invoke(app, ["margins", "--config", str(file), "--export", "trl"])
    assert called.exit_code == 0, called.output
    assert "margins: done already" in called.output
    data = load_dataset(str(export.STAGE.folder(config) / "data"), split="train")
    pairs = read_split(margins.STAGE.rows(config), "train", ["margin"])
    assert data["margin"] == pairs["margin"].to_pylist()


def test_texts_with_their_numbers(config: Config) -> None:
    """Split by split, in order; no file for a split without pairs."""
    tables = exported(config, scored(8))
    assert {name: table.num_rows for name, table in tables.items()} == {
        "train": 6,
        "validation": 2,
    }
    train = tables["train"]
    assert train["pair_id"].to_pylist() == [f"pair-{i}" for i in (0, 1, 2, 4, 5, 6)]
    assert train["chosen"].to_pylist() == [f" good {i}" for i in (0, 1, 2, 4, 5, 6)]
    settings = config.train
    weights = madpo_weight(
        torch.tensor(train["margin"].to_pylist(), dtype=torch.float64),
        c_min=settings.c_min,
        c_max=settings.c_max,
        lmbda=settings.lmbda,
        tau=settings.tau,
    )
    assert train["weight"].to_pylist() == weights.tolist()


def test_messages_are_lists(config: Config, tmp_path: Path) -> None:
    """Each with its own keys: a template would see a null where a message has none."""
    table = scored(8, messages=True)
    conversation = [
        {"role": "user", "content": " say 2", "name": "eve"},
        {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x": 1, "y": 1.5}}]},
        {"role": "tool", "content": [{"type": "text", "text": "3"}]},
    ]
    table["prompt"][2] = json.dumps(conversation)
    exported(config, table)
    data = load_dataset(
        str(export.STAGE.folder(config) / "data"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert data[1]["prompt"] == [{"role": "user", "content": " say 1"}]
    assert data[2]["prompt"] == conversation


def test_margins_without_rewards_have_no_weight(raw_config: dict[str, Any]) -> None:
    raw_config["train"]["loss_type"] = "sigmoid"
    table = scored(8)
    del table["margin"]
    names = exported(parse_config(raw_config), table)["train"].column_names
    assert "ref_chosen_logps" in names
    assert not {"margin", "weight", "split"} & set(names)


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trl_renders_messages_as_they_were(
    config: Config, tokenizer: Any, model_folder: Path, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    table = scored(8, messages=True)
    turns = [
        {"role": "user", "content": " say 2"},
        {"role": "assistant", "content": " good", "name": "eve"},
        {"role": "user", "content": " bad"},
    ]
    table["prompt"][2] = json.dumps(turns)
    exported(config, table)
    data = load_dataset(
        str(export.STAGE.folder(config) / "data"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if 'name' in m %} kind{% endif %}{% endfor %}"
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
    )
    trainer = DPOTrainer(
        model=str(model_folder), args=arguments, train_dataset=data, processing_class=tokenizer
    )
    expected = tokenizer.apply_chat_template(turns, tokenize=False)
    assert " kind" in expected
    assert tokenizer.decode(trainer.train_dataset[2]["prompt_ids"]) == expected


@pytest.mark.parametrize("row", [0, 2])
def test_texts_next_to_messages_are_refused(row: int, config: Config) -> None:
    table = scored(8, messages=True)
    table["prompt"][row] = " say 2"
    with pytest.raises(UserError, match="split train cannot be exported: some are texts and some"):
        exported(config, table)


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trl_trains_on_it_with_our_losses(
    finished_run: tuple[Config, list[str]], tokenizer: Any, tmp_path: Path
) -> None:
    """Two steps over the same pairs, from a policy that is not the reference."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    config, _ = finished_run
    folder = tmp_path / "policy"
    make_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shared = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 2}

    # TRL, from the exported files.
    pipeline.run_stage(config, export.STAGE, say=lambda what: None)
    data = load_dataset(
        str(export.STAGE.folder(config) / "data"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_length=config.data.max_length,
        per_device_train_batch_size=NUM_PAIRS,
        beta=0.1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **shared,
    )
    trainer = DPOTrainer(
        model=str(folder),
        args=arguments,
        train_dataset=data.select(range(NUM_PAIRS)),
        processing_class=tokenizer,
    )
    trainer.precompute_ref_logps = True  # its loss then reads the columns
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    # Ours, on the same rows.
    names = ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"]
    names += ["prompt_length", "chosen_length", "rejected_length"]
    names += ["split", "margin", "ref_chosen_logps", "ref_rejected_logps"]
    rows = margins.STAGE.rows(config)
    train = read_split(rows, "train", names).slice(0, NUM_PAIRS)
    validation = read_split(rows, "validation", names)
    write_table(pa.concat_tables([train, validation]), tmp_path / "rows")
    job = make_policy_job(folder, tmp_path / "rows", tmp_path)(
        "ours",
        loss_type="sigmoid",
        beta=0.1,
        global_batch_size=NUM_PAIRS,
        per_device_train_batch_size=NUM_PAIRS,
        weight_decay=arguments.weight_decay,
        adam_beta1=arguments.adam_beta1,
        adam_beta2=arguments.adam_beta2,
        adam_epsilon=arguments.adam_epsilon,
        max_grad_norm=arguments.max_grad_norm,
        **shared,
    )
    Ranks(job, 1, tmp_path).outcome()
    assert theirs == pytest.approx(logged(job).tolist(), abs=2e-4)
    assert theirs[1] < theirs[0] - 1e-3
