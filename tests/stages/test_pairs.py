"""Stage pairs on a real Ray: ids, splits and rejects."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.artifacts.tables import read_columns, read_split
from madpo_ray.config import parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages import pairs
from support.pairs import make_rows, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


class Result:
    """What the stage made of a config's data."""

    def __init__(self, raw: dict[str, Any]) -> None:
        raw["evaluate"] = {}
        config = parse_config(raw)
        self.results = pairs.STAGE.run(config)
        self.rows = pairs.STAGE.rows(config)
        names = ("pair_id", "prompt", "group", "split")
        self.table = read_columns(self.rows, names)
        self.rejects = pq.read_table(pairs.STAGE.folder(config) / "rejects.parquet")


def run(raw: dict[str, Any], rows: list[Any], tmp_path: Path, **data: Any) -> Result:
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    raw["data"] |= {"files": [str(file)], "keep_columns": [], **data}
    return Result(raw)


def test_good_rows_and_rejects(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """In the order of the file; repeats are numbered; every reject has its row and reason."""
    good = make_rows(60)
    bad = [
        "{not json",
        {"prompt": "", "chosen": "a", "rejected": "b"},
        "[1]",
        {**good[0], "chosen": good[0]["rejected"]},
    ]
    too_long = {**good[1], "prompt": "film " * 90}
    result = run(raw_config, [*good[:30], *bad, *good[30:], good[5], good[5], too_long], tmp_path)

    assert result.table.num_rows == sum(result.results["pairs"].values()) == 62
    assert result.table["prompt"].to_pylist()[:60] == [row["prompt"] for row in good]
    ids = result.table["pair_id"].to_pylist()
    assert len(set(ids)) == 62
    repeated = [ids[i].rsplit("-") for i in (5, 60, 61)]
    assert [number for _, number in repeated] == ["0", "1", "2"]
    assert len({digest for digest, _ in repeated}) == 1

    assert result.rejects["row"].to_pylist() == [30, 31, 32, 33, 66]
    reasons = result.rejects["reason"].to_pylist()
    assert "not JSON" in reasons[0]
    assert "leaves no room" in reasons[-1]
    assert sum(result.results["rejects"].values()) == 5


def test_repeats_are_numbered_across_files(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Of both kinds of files, in the order of data.files."""
    rows = make_rows(40)
    table = pa.Table.from_pylist([*rows[:1], *rows[20:], *rows[:1]])
    pq.write_table(table, tmp_path / "b.parquet")
    first = write_jsonl(tmp_path / "a.jsonl", rows[:20])
    files = [str(first), str(tmp_path / "b.parquet")]
    raw_config["data"] |= {"files": files, "keep_columns": []}
    ids = Result(raw_config).table["pair_id"].to_pylist()
    digest = ids[0].rsplit("-")[0]
    repeated = [(i, name) for i, name in enumerate(ids) if name.startswith(digest)]
    assert repeated == [(0, f"{digest}-0"), (20, f"{digest}-1"), (41, f"{digest}-2")]


def test_groups_stay_in_one_split(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "user": f"u{i % 20}"} for i, row in enumerate(make_rows(100))]
    table = run(raw_config, rows, tmp_path, group_column="user").table
    splits: dict[str, set[str]] = {}
    for group, split in zip(table["group"].to_pylist(), table["split"].to_pylist(), strict=True):
        splits.setdefault(group, set()).add(split)
    assert len(splits) == 20
    assert all(len(own) == 1 for own in splits.values())


def test_conversations_with_a_split_column(raw_config: dict[str, Any], tmp_path: Path) -> None:
    splits = ["train", "validation", "test"]
    conversations = make_rows(30, conversational=True)
    rows = [{**row, "part": splits[i % 3]} for i, row in enumerate(conversations)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    raw_config["data"] |= {
        "files": [str(tmp_path / "in.parquet")],
        "split_column": "part",
        "keep_columns": [],
    }
    test = read_split(Result(raw_config).rows, "test", ("prompt", "chosen"))
    assert test["prompt"].to_pylist() == [row["prompt"] for row in rows[2::3]]


def test_messages_need_a_chat_template(
    raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    raw_config["model"]["model_name_or_path"] = str(bare)
    with pytest.raises(UserError, match=r"set model\.chat_template_path"):
        run(raw_config, make_rows(10, conversational=True), tmp_path)


def test_no_usable_pair_is_refused(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2
    with pytest.raises(UserError, match=r"no usable pair.*2 x chosen and rejected are identical"):
        run(raw_config, rows, tmp_path)
    assert not (tmp_path / "tiny" / "pairs").exists()


def test_one_prompt_for_all_is_refused(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "prompt": "same"} for row in make_rows(20)]
    with pytest.raises(UserError, match=r"set data\.group_column or data\.split_column"):
        run(raw_config, rows, tmp_path)
