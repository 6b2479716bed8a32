"""The files that a config names."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetBuilder, DatasetDict, load_dataset_builder

from madpo_ray.data import files
from madpo_ray.data.sources import (
    HUB_DATASET,
    KINDS,
    bound_rows,
    files_of_train,
    list_files,
    open_source,
)
from madpo_ray.errors import UserError


def test_suffixes_are_unique() -> None:
    suffixes = [suffix for kind in KINDS for suffix in kind.suffixes]
    assert len(suffixes) == len(set(suffixes))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "does not exist"),
        ("a.txt", r"must end in \.parquet, \.arrow, .* or \.tsv \(text also with \.gz or \.zst\)"),
    ],
)
def test_refuses_what_is_no_source(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / name))


def test_limits_are_what_the_messages_say() -> None:
    assert (files.MAX_LINE_BYTES, files.ROWS_PER_BATCH) == (64 * 2**20, 1024)


def names_in(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return [str(folder / name) for name in names]


def test_folder_stands_for_its_files(tmp_path: Path) -> None:
    """In the order of their names; what is hidden or of another kind is left out."""
    b, a, *_ = names_in(tmp_path, "b.jsonl", "a.CSV.gz", ".c.jsonl", "_d.csv", "e.txt", "f/g.csv")
    assert list_files([str(tmp_path)]) == [a, b]


def test_data_that_a_folder_leaves_out_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names_in(tmp_path, "a.jsonl", "b/c.jsonl", "note.txt.zip")
    for _ in range(2):
        list_files([str(tmp_path)])
    assert caplog.text.count("files in its subfolders are not read, such as") == 1
    names_in(tmp_path, "d.JSONL.bz2")
    with pytest.raises(UserError, match=r"d\.JSONL\.bz2: \.bz2 is not read: compress it with gzip"):
        list_files([str(tmp_path)])


def test_pattern_stands_for_its_files(tmp_path: Path) -> None:
    a, b, c = names_in(tmp_path, "x/a.jsonl", "x/b.jsonl", "x/y/c.jsonl")
    assert list_files([str(tmp_path / "x/*.jsonl")]) == [a, b]
    assert list_files([str(tmp_path / "**/*.jsonl")]) == [a, b, c]
    with pytest.raises(UserError, match="no file matches"):
        list_files([str(tmp_path / "*.csv")])
    (odd,) = names_in(tmp_path, "[1].jsonl")
    assert list_files([odd]) == [odd]


def builder_of(folder: Path) -> DatasetBuilder:
    found: DatasetBuilder = load_dataset_builder(str(folder), cache_dir=folder.parent / "cache")
    return found


def test_data_set_of_the_hub_is_its_split_train(tmp_path: Path) -> None:
    """As its card says, or the names of its files; a folder here is read as one there."""
    a, b, _ = names_in(
        tmp_path / "named",
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
    )
    assert files_of_train(builder_of(tmp_path / "named"), "hf://datasets/x/y") == [a, b]

    names_in(tmp_path / "carded", "first.jsonl")
    files = [{"split": "train_prefs", "path": "f*"}]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (tmp_path / "carded" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(UserError, match=r"no split train \(its splits: train_prefs\): .*first\.js"):
        files_of_train(builder_of(tmp_path / "carded"), "hf://datasets/x/y")


@pytest.mark.parametrize(
    ("name", "is_data_set"),
    [
        ("a/b", True),
        ("a/b@main", True),
        ("a/b@refs/pr/1", True),
        ("a/b@main/data", False),
        ("a/b@main/data/*.parquet", False),
        ("a/b@refs/pr/1/data/x.parquet", False),
        ("a/b/data", False),
        ("a", False),
    ],
)
def test_names_of_data_sets(name: str, is_data_set: bool) -> None:
    """A file or folder of one, also at a revision, is read as it is named."""
    assert bool(HUB_DATASET.fullmatch(f"hf://datasets/{name}")) == is_data_set


def test_folder_of_datasets_is_read_in_its_order(tmp_path: Path) -> None:
    data = Dataset.from_list([{"a": i} for i in range(7)])
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    files = list_files([str(tmp_path / "saved")])
    assert [row for file in files for row in open_source(file).rows()] == data.to_list()
    DatasetDict(train=data).save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match="holds several data sets: name one of its folders"):
        list_files([str(tmp_path / "several")])
    (tmp_path / "saved" / "state.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        list_files([str(tmp_path / "saved")])


@pytest.mark.parametrize("name", ["", "*.jsonl", "b.jsonl"])
def test_link_to_nothing_is_refused(name: str, tmp_path: Path) -> None:
    """Half of the data would be missing; links that are no data do not matter."""
    names_in(tmp_path, "a.jsonl")
    (tmp_path / "notes").symlink_to(tmp_path / "none")
    assert len(list_files([str(tmp_path)])) == 1
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl (is a link to nothing|does not exist)"):
        list_files([str(tmp_path / name)])


def test_torn_file_has_no_count(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % (i * 7919) for i in range(9000)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    assert bound_rows(str(tmp_path / "a.jsonl.gz")) == 9000
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        bound_rows(str(tmp_path / "a.jsonl.gz"))


def test_empty_folder_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file that ends in \.parquet"):
        list_files([str(tmp_path)])
    with pytest.raises(UserError, match="does not exist"):
        list_files([str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize("second", ["a.jsonl", "./a.jsonl", "link.jsonl", "*.jsonl", "."])
def test_one_file_under_two_names_is_refused(second: str, tmp_path: Path) -> None:
    """All of its pairs would be doubled."""
    (file,) = names_in(tmp_path, "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    with pytest.raises(UserError, match="are one file: list it once"):
        list_files([file, str(tmp_path / second)])
