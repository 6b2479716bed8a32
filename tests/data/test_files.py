"""Files in a store: a local S3 server, and names that no store has."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from moto.server import ThreadedMotoServer

from madpo_ray.config import parse_config
from madpo_ray.data.files import DataFile, StoreUri, forget_versions
from madpo_ray.data.sources import list_files, open_source
from madpo_ray.errors import UserError

ROWS = [{"prompt": "p", "chosen": f"good {i}", "rejected": "bad"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def options() -> Iterator[str]:
    """What follows a path in the URI of a file on the server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        host, port = server.get_host_and_port()
        yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture(scope="module")
def store(options: str) -> pyarrow.fs.FileSystem:
    """A bucket with a folder of files of three kinds."""
    system, _ = pyarrow.fs.FileSystem.from_uri(f"s3://pairs/{options}&allow_bucket_creation=true")
    system.create_dir("pairs")
    with system.open_output_stream("pairs/new/b.jsonl") as stream:
        stream.write(LINES)
    with system.open_output_stream("pairs/new/c.jsonl.gz", compression="gzip") as stream:
        stream.write(LINES)
    pq.write_table(pa.Table.from_pylist(ROWS), "pairs/new/a.parquet", filesystem=system)
    with system.open_output_stream("pairs/notes/README.md") as stream:
        stream.write(b"not data")
    return system


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("new/b.jsonl", ["b.jsonl"]),
        ("new", ["a.parquet", "b.jsonl", "c.jsonl.gz"]),
        ("*/*.jsonl*", ["b.jsonl", "c.jsonl.gz"]),
        ("**/*.parquet", ["a.parquet"]),
    ],
)
def test_files_of_a_bucket(name: str, expected: list[str], options: str) -> None:
    found = list_files([f"s3://pairs/{name}{options}"])
    assert found == [f"s3://pairs/new/{one}{options}" for one in expected]
    for file in found:
        source = open_source(file)
        assert source.columns() == ["prompt", "chosen", "rejected"]
        assert list(source.rows()) == ROWS
        assert source.count() >= len(ROWS)


def test_saved_folder_in_a_bucket(
    store: pyarrow.fs.FileSystem, options: str, tmp_path: Path
) -> None:
    """Its files are those that `datasets` lists, and its notes are no rows."""
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    DatasetDict(train=data).save_to_disk(tmp_path / "several")
    for name in ("saved", "several"):
        pyarrow.fs.copy_files(str(tmp_path / name), f"pairs/{name}", destination_filesystem=store)
    files = list_files([f"s3://pairs/saved/{options}"])
    assert [row for file in files for row in open_source(file).rows()] == ROWS
    with pytest.raises(UserError, match="holds several data sets: name one of its folders"):
        list_files([f"s3://pairs/several{options}"])


def test_version_changes_with_the_file(store: pyarrow.fs.FileSystem, options: str) -> None:
    """Its size or its time; a store is asked once, until the version is forgotten."""
    file = DataFile(f"s3://pairs/changing.jsonl{options}")
    versions = set()
    for content in (LINES, LINES + LINES, LINES.upper() + LINES):
        with store.open_output_stream("pairs/changing.jsonl") as stream:
            stream.write(content)
        assert file.version() in versions or not versions
        forget_versions()
        versions.add(file.version())
        time.sleep(1.1)  # the server's clock has seconds
    assert len(versions) == 3


@pytest.mark.parametrize(
    "name", ["a b.jsonl", "a#b.jsonl", "a?b.jsonl", "a%20b.jsonl", "a[1].jsonl"]
)
def test_unusual_names(name: str, store: pyarrow.fs.FileSystem, options: str) -> None:
    with store.open_output_stream(f"pairs/unusual/{name}") as stream:
        stream.write(LINES)
    for listed in (f"unusual/{name}", "unusual"):
        (file,) = list_files([f"s3://pairs/{listed}{options}"])
        assert list(open_source(file).rows()) == ROWS
    store.delete_file(f"pairs/unusual/{name}")


def test_pattern_is_of_files(store: pyarrow.fs.FileSystem, options: str) -> None:
    """A folder may have such a name, too."""
    for path in ("pairs/mixed/a.jsonl", "pairs/mixed/b.jsonl/part.txt"):
        with store.open_output_stream(path) as stream:
            stream.write(LINES)
    found = list_files([f"s3://pairs/mixed/*.jsonl{options}"])
    assert found == [f"s3://pairs/mixed/a.jsonl{options}"]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs/none.jsonl", "does not exist"),
        ("other/none.jsonl", "does not exist"),
        ("pairs/*.csv", "no file matches"),
        ("pairs/notes", "holds no file that ends in"),
    ],
)
def test_what_is_not_there(name: str, message: str, options: str) -> None:
    with pytest.raises(UserError, match=message):
        list_files([f"s3://{name}{options}"])


def test_store_that_does_not_answer(options: str) -> None:
    nowhere = "?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(UserError, match=r"s3://pairs/a\.jsonl.* cannot be read: .*onnect"):
        list_files([f"s3://pairs/a.jsonl{nowhere}"])


@pytest.mark.parametrize("name", ["a/b", "a/b@main", "a/b/data", "a/b/data/*.parquet"])
def test_hub_that_is_not_there(name: str) -> None:
    """The tests are offline."""
    with pytest.raises(UserError, match=r"data\.files: hf://datasets/a/b\S* cannot be read"):
        list_files([f"hf://datasets/{name}"])


def test_public_buckets_are_read_without_credentials() -> None:
    place = StoreUri.of("gs://anonymous@bucket/a/b.jsonl")
    assert place.path == "bucket/a/b.jsonl"
    _, (options,) = place.system.__reduce__()
    assert options["anonymous"]
    assert place.uri("bucket/c") == "gs://anonymous@bucket/c"
    assert StoreUri.of(place.uri(place.path)) == place


def test_names_of_stores_stay_as_they_are(raw_config: dict[str, Any], options: str) -> None:
    names = [f"s3://pairs/new/b.jsonl{options}", "hf://datasets/a/b@main/data/*.parquet"]
    raw_config["data"]["files"] = names
    assert list(parse_config(raw_config).data.files) == names
