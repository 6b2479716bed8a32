"""What is refused before any row is tokenised."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.checks import check_counts, check_files, holds_messages
from madpo_ray.data.files import DAMAGED
from madpo_ray.errors import UserError
from support.pairs import messages, write_jsonl

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def data(tmp_path: Path, *rows: Any, **settings: Any) -> DataConfig:
    file = write_jsonl(tmp_path / "a.jsonl", list(rows))
    return DataConfig(files=(str(file),), **settings)


def test_names_a_missing_column(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejekted": "b"}
    with pytest.raises(UserError, match="no column 'rejected'; did you mean 'rejekted'"):
        check_files(data(tmp_path, row))


@pytest.mark.parametrize("name", ["keep_columns", "split_column", "group_column", "system_column"])
def test_names_every_configured_column(name: str, tmp_path: Path) -> None:
    value = ("skore",) if name == "keep_columns" else "skore"
    with pytest.raises(UserError, match="no column 'skore'; did you mean 'score'"):
        check_files(data(tmp_path, {**PAIR, "score": 1.0}, **{name: value}))


def test_invents_no_prompt(tmp_path: Path) -> None:
    """The common beginning of two texts is not certain to be the prompt."""
    row = {"question": "q", "chosen": "The first", "rejected": "The second"}
    message = "no column 'prompt'; did you mean 'question'.*data.prompt_column.*implicit_prompt"
    with pytest.raises(UserError, match=message):
        check_files(data(tmp_path, row))
    check_files(data(tmp_path, row, prompt_column="question"))
    check_files(data(tmp_path, row, implicit_prompt=True))


def test_messages_without_a_prompt_column_have_a_system_column(tmp_path: Path) -> None:
    """The error names that column, not the prompt."""
    first = [{"role": "user", "content": "p"}]
    row = {name: first + messages(chosen=name)["chosen"] for name in ("chosen", "rejected")}
    with pytest.raises(UserError, match="column 'system' belongs to the prompt"):
        check_files(data(tmp_path, {**row, "system": "be brief"}))
    with pytest.raises(UserError, match="column 'system' belongs to the prompt"):
        check_files(data(tmp_path, row, {**row, "system": "be brief"}))


def test_names_the_columns_that_there_are(tmp_path: Path) -> None:
    message = r"choose from chosen, rejected, zzz\. Set data\.prompt_column"
    with pytest.raises(UserError, match=message):
        check_files(data(tmp_path, {"zzz": 1, "chosen": "a", "rejected": "b"}))


def test_a_deep_first_row_is_passed_over(tmp_path: Path) -> None:
    deep = "[" * 3000 + "]" * 3000
    line = json.dumps({**PAIR, "chosen": [{"role": "user", "x": 0}]}).replace("0", deep)
    check_files(data(tmp_path, line, PAIR))


def test_names_a_column_that_belongs_to_the_prompt(tmp_path: Path) -> None:
    """Although only some rows fill it."""
    rows = [{**PAIR, "system": ""}, {**PAIR, "system": "be brief"}]
    with pytest.raises(UserError, match=r"a\.jsonl: column 'system' belongs to .*system_column"):
        check_files(data(tmp_path, *rows))
    check_files(data(tmp_path, *rows, ignore_columns=("system",)))
    row = {"instruction": "q", "chosen": "The first", "rejected": "The second"}
    with pytest.raises(UserError, match="column 'instruction' belongs to the prompt"):
        check_files(data(tmp_path, row, implicit_prompt=True))


def test_one_bad_row_does_not_decide_what_the_prompt_is(tmp_path: Path) -> None:
    first = [{"role": "user", "content": "p"}]
    good = {name: first + messages(chosen=name)["chosen"] for name in ("chosen", "rejected")}
    check_files(data(tmp_path, {"chosen": "a", "rejected": "b"}, good))


def test_messages_may_share_their_prompt(tmp_path: Path) -> None:
    first = [{"role": "user", "content": "p"}]
    row = {
        "chosen": first + messages(chosen="a")["chosen"],
        "rejected": first + messages(chosen="b")["chosen"],
    }
    check_files(data(tmp_path, row))


def test_finds_messages(tmp_path: Path) -> None:
    """In the first good row, also below a mapped name."""
    assert not holds_messages(data(tmp_path, PAIR))
    conversation = messages(prompt="p", chosen="a", rejected="b")
    mapped = {"question": "p", "a": conversation["chosen"], "b": conversation["rejected"]}
    columns = {"prompt_column": "question", "chosen_column": "a", "rejected_column": "b"}
    assert holds_messages(data(tmp_path, "{", mapped, **columns))


LIKELY = ["question", "instruction", "query", "input", "context", "problem", "user"]


@pytest.mark.parametrize("name", LIKELY)
def test_names_what_others_call_the_prompt(name: str, tmp_path: Path) -> None:
    row = {name: "q", "chosen": "The first", "rejected": "The second"}
    with pytest.raises(UserError, match=f"no column 'prompt'; did you mean '{name}'"):
        check_files(data(tmp_path, row))


def test_names_a_misspelt_prompt(tmp_path: Path) -> None:
    row = {"promt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"'prompt'; did you mean 'promt'\? Set data"):
        check_files(data(tmp_path, row))


def test_files_without_a_row_pass(tmp_path: Path) -> None:
    """What they lack shows when they have rows."""
    check_files(data(tmp_path, "1"))
    empty = pa.array([], pa.string())
    pq.write_table(pa.table({"chosen": empty, "rejected": empty}), tmp_path / "e.parquet")
    with pytest.raises(UserError, match="no column 'prompt'"):
        check_files(DataConfig(files=(str(tmp_path / "e.parquet"),)))


def test_asked_for_implicit_prompts_pass(tmp_path: Path) -> None:
    check_files(data(tmp_path, {"chosen": "same", "rejected": "same"}, implicit_prompt=True))


def test_no_good_row_holds_no_messages(tmp_path: Path) -> None:
    assert holds_messages(data(tmp_path, "{")) is False


def test_share_of_rejects_is_of_all_rows(tmp_path: Path) -> None:
    """Also of those that the config leaves out."""
    results = {
        "pairs": {"train": 30, "validation": 5, "test": 5},
        "rejects": {"prompt is empty": 60},
        "left_out": {"prompt + response is longer than max_length": 900},
    }
    check_counts(results, DataConfig(files=("a.parquet",), max_reject_fraction=0.06))
    with pytest.raises(UserError, match="60 of 1000 rows are rejected"):
        check_counts(results, DataConfig(files=("a.parquet",), max_reject_fraction=0.05))


def test_damaged_file_is_refused_whatever_fraction_is_rejected(tmp_path: Path) -> None:
    """It is one reason, and nobody knows how many rows."""
    tolerant = DataConfig(files=("a.parquet",), max_reject_fraction=1.0)
    results = {"pairs": {"train": 90, "validation": 9, "test": 9}, "rejects": {DAMAGED: 1}}
    with pytest.raises(UserError, match=r"1 of the files in a\.parquet are damaged, end too"):
        check_counts(results, tolerant)
