"""Stage pairs on a real Ray: ids, splits and rejects."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from madpo_ray.artifacts.tables import column_names, read_columns, read_split
from madpo_ray.config import parse_config
from madpo_ray.data import text_sources
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


@pytest.mark.parametrize("piece_bytes", [8 * 2**20, 1000], ids=["whole", "cut"])
def test_good_rows_and_rejects(
    piece_bytes: int, raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the file; repeats are numbered; every reject has its row and reason."""
    monkeypatch.setattr(text_sources, "PIECE_BYTES", piece_bytes)
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
    stored = [json.loads(prompt) for prompt in test["prompt"].to_pylist()]
    assert stored == [row["prompt"] for row in rows[2::3]]


def test_messages_need_a_chat_template(
    raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    raw_config["model"]["model_name_or_path"] = str(bare)
    with pytest.raises(UserError, match=r"set model\.chat_template_path"):
        run(raw_config, make_rows(10, conversational=True), tmp_path)


def test_unusual_rows_are_counted_and_shown(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Cut responses by split, removed prompts, and reasons without the rows' values."""
    rows = make_rows(60)
    for row in rows[:3]:
        row |= {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    for i in range(3, 9):
        rows[i] |= {"chosen": " good" * 90}
    bad = [{**rows[20], "prompt": "film " * n} for n in (80, 90)]
    result = run(raw_config, [*rows, *bad], tmp_path)
    assert result.results["repeated_prompts"] == 3
    assert sum(result.results["cut_responses"].values()) == 6
    assert result.results["rejects"] == {
        "the prompt leaves no room for a response in max_length": 2
    }
    lines = pairs.describe(result.results)
    assert "without the model's chat template" in str(lines[1])
    assert str(lines[2]).startswith("responses cut at data.max_length: ")
    assert str(lines[3]).startswith("3 pairs repeated the prompt")


def test_scored_responses_become_pairs(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """All pairs of a row, in one split; ties are counted, and no rejects."""
    rows: list[Any] = [
        {"prompt": f"film {i}", "texts": [" good", " bad", f" dull {i}"], "stars": [3, 1, i % 3]}
        for i in range(40)
    ]
    rows.append({"prompt": "film", "texts": [" good"], "stars": [3]})
    result = run(
        raw_config,
        rows,
        tmp_path,
        responses_column="texts",
        scores_column="stars",
        pairing="all",
        keep_columns=["score_chosen", "score_rejected"],
    )
    num_ties = sum(i % 3 == 1 for i in range(40))
    assert result.results["left_out"]["both responses have the same score"] == num_ties
    assert result.table.num_rows == sum(result.results["pairs"].values()) == 3 * 40 - num_ties
    assert result.results["rejects"] == {"texts has fewer than two responses": 1}
    assert result.rejects["row"].to_pylist() == [40]
    splits: dict[str, set[str]] = {}
    for prompt, split in zip(
        result.table["prompt"].to_pylist(), result.table["split"].to_pylist(), strict=True
    ):
        splits.setdefault(prompt, set()).add(split)
    assert all(len(own) == 1 for own in splits.values())
    scores = read_columns(result.rows, ["score_chosen", "score_rejected"]).to_pylist()
    assert all(row["score_chosen"] > row["score_rejected"] for row in scores)
    assert any(
        "left out: 13 x both responses" in str(line) for line in pairs.describe(result.results)
    )


def test_duplicates_contradictions_and_long_pairs(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """All that is read is a pair, a reject, or left out."""
    rows = make_rows(60)
    blank: list[Any] = [""]
    swapped = {**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}
    long = {**rows[4], "chosen": " good" * 90}
    rows += [rows[0], rows[1], *blank, rows[1], swapped, long]  # a blank line is nothing
    kept = run(raw_config, rows, tmp_path)
    assert kept.results["duplicates"] == 3
    assert kept.results["contradictions"] == 2
    assert sum(kept.results["pairs"].values()) == 65

    raw_config["run"]["name"] = "dropped"
    options = {"duplicates": "drop", "contradictions": "majority", "over_length": "drop"}
    dropped = run(raw_config, rows, tmp_path, **options)
    assert dropped.table.num_rows == sum(dropped.results["pairs"].values()) == 59
    assert sum(dropped.results["left_out"].values()) == 6
    assert dropped.rejects.num_rows == 0
    assert [one for one in dropped.table["pair_id"].to_pylist() if not one.endswith("-0")] == []

    raw_config["run"]["name"] = "rejected"
    rejected = run(raw_config, rows, tmp_path, over_length="reject")
    assert rejected.results["rejects"] == {"prompt + response is longer than max_length": 1}


def test_counts_are_of_the_pairs_that_are_left(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Not of those that repeat; a file may have no other."""
    rows = make_rows(40)
    long = {**rows[0], "chosen": " good" * 90, "rejected": " bad" * 90}
    own = write_jsonl(tmp_path / "own.jsonl", [*rows, long, long])
    repeated = write_jsonl(tmp_path / "repeated.jsonl", [rows[1], long])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{**rows[1], "prompt": ""}])
    raw_config["data"]["files"] = [str(own), str(repeated), str(bad)]
    raw_config["data"] |= {"duplicates": "drop", "over_length": "truncate"}
    config = parse_config(raw_config)
    results = pairs.STAGE.run(config)
    assert sum(results["pairs"].values()) == 41
    assert sum(results["cut_responses"].values()) == 2
    assert results["files_without_pairs"] == [str(repeated), str(bad)]


def test_share_of_rejects_is_limited(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [*make_rows(20), *[{"prompt": "", "chosen": "a", "rejected": "b"}] * 10]
    message = r"10 of 30 rows are rejected, more than data\.max_reject_fraction 0\.3 allows: 10 x"
    with pytest.raises(UserError, match=message):
        run(raw_config, rows, tmp_path, max_reject_fraction=0.3)
    run(raw_config, rows, tmp_path, max_reject_fraction=0.4)


def test_path_with_an_equals_sign_is_no_column(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Neither in the data's path nor in the run's."""
    raw_config["run"]["storage_path"] = str(tmp_path / "split=all" / "beta=0.1")
    result = run(raw_config, make_rows(30), tmp_path)
    assert set(result.table["split"].to_pylist()) <= {"train", "validation", "test"}
    assert "beta" not in column_names(result.rows)


def test_tokenizer_beyond_the_vocabulary_is_refused(
    raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """Before a worker looks up an embedding that does not exist."""
    small = tmp_path / "small"
    shutil.copytree(model_folder, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    raw_config["model"]["model_name_or_path"] = str(small)
    with pytest.raises(UserError, match="the model has 200 embeddings"):
        run(raw_config, make_rows(10), tmp_path)


def test_no_usable_pair_is_refused(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2
    with pytest.raises(UserError, match=r"no usable pair.*2 x chosen and rejected are identical"):
        run(raw_config, rows, tmp_path)
    assert not (tmp_path / "tiny" / "pairs").exists()


def test_nothing_to_validate_on_is_refused(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is read."""
    raw_config["data"]["validation_fraction"] = 0
    with pytest.raises(UserError, match="leaves no pair to validate on"):
        pairs.STAGE.check(parse_config(raw_config))


def test_one_prompt_for_all_is_refused(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**row, "prompt": "same"} for row in make_rows(20)]
    with pytest.raises(UserError, match=r"set data\.group_column or data\.split_column"):
        run(raw_config, rows, tmp_path)


def test_every_kind_of_file_gives_the_same_pairs(
    raw_config: dict[str, Any], tmp_path: Path
) -> None:
    """Also a CSV file's numbers, which are text there."""
    rows = [{**row, "score": i / 4} for i, row in enumerate(make_rows(60))]
    expected = run(raw_config, rows, tmp_path, keep_columns=["score"])

    folder = tmp_path / "folder"
    folder.mkdir()
    first, second, third, fourth = (rows[i : i + 15] for i in range(0, 60, 15))
    lines = "".join(json.dumps(row) + "\n" for row in first)
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (folder / "2.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(second[0]))
        writer.writeheader()
        writer.writerows(second)
    (folder / "3.json").write_text(json.dumps(third, indent=2))
    feather.write_feather(pa.Table.from_pylist(fourth), folder / "4.arrow")
    raw_config["data"]["files"] = [str(folder)]
    raw_config["run"]["name"] = "folder"
    found = Result(raw_config)
    assert found.table == expected.table
    names = ("score", "chosen_ids", "chosen_length")
    assert read_columns(found.rows, names) == read_columns(expected.rows, names)
    lengths = read_columns(found.rows, names).to_pylist()
    assert all(len(row["chosen_ids"]) == row["chosen_length"] for row in lengths)
