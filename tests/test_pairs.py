"""Reading, checking, tokenising and splitting pairs; bad rows end in the rejects with a reason."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl

from madpo_ray import pairs
from madpo_ray.artifacts import read_manifest
from madpo_ray.config import DataConfig, UserError
from madpo_ray.config_file import parse_config
from madpo_ray.formats import BadRowError, parse_pair, tokenize_pair
from madpo_ray.pairs import split_of
from madpo_ray.tables import parquet_folder, read_split


def messages(**texts: str) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}


def test_formats() -> None:
    standard = {"prompt": "p", "chosen": " a", "rejected": " b"}
    assert parse_pair(standard) == standard
    conversation = messages(prompt="p", chosen="a", rejected="b")
    assert parse_pair(conversation) == conversation
    assert parse_pair({"chosen": "the sky is blue", "rejected": "the sky is green"}) == {
        "prompt": "the sky is",
        "chosen": " blue",
        "rejected": " green",
    }
    implicit = {
        "chosen": conversation["prompt"] + conversation["chosen"],
        "rejected": conversation["prompt"] + conversation["rejected"],
    }
    assert parse_pair(implicit) == conversation


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen is neither text nor a list"),
        ({"prompt": "p", "chosen": "a"}, "rejected is missing"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({**messages(prompt="p", chosen="a"), "rejected": "b"}, "different kinds"),
        ({"prompt": "p", **messages(chosen="a", rejected="b")}, "different kinds"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parse_pair(row)


def test_tokens_are_those_of_the_joint_text(tokenizer: Any) -> None:
    for pair in (
        {"prompt": "the film", "chosen": " is good", "rejected": " is bad"},
        messages(prompt="p", chosen="a", rejected="b"),
    ):
        tokens = tokenize_pair(pair, tokenizer, 64)
        for side in ("chosen", "rejected"):
            ids = tokens["prompt_ids"] + tokens[f"{side}_ids"]
            if isinstance(pair["prompt"], str):
                assert ids == [*tokenizer(pair["prompt"] + pair[side])["input_ids"], tokenizer.eos_token_id]
            else:
                text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
                assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id


def test_a_token_merged_over_the_border_belongs_to_the_response(tokenizer: Any) -> None:
    # "film" is one token; as a prompt "fi" is others, so "fi" + "lm" must not be split inside "film".
    whole = tokenizer("the film")["input_ids"]
    tokens = tokenize_pair({"prompt": "the fi", "chosen": "lm is", "rejected": "ne is"}, tokenizer, 64)
    assert tokens["prompt_ids"] == whole[: len(tokens["prompt_ids"])]
    assert (tokens["prompt_ids"] + tokens["chosen_ids"])[: len(whole)] == whole
    assert len(tokens["prompt_ids"]) < len(tokenizer("the fi")["input_ids"])


def test_truncation_cuts_responses_and_refuses_long_prompts(tokenizer: Any) -> None:
    pair = {"prompt": "the film", "chosen": " is good good good good", "rejected": " is bad bad bad bad bad"}
    prompt = len(tokenize_pair(pair, tokenizer, 64)["prompt_ids"])
    tokens = tokenize_pair(pair, tokenizer, prompt + 3)
    assert [len(tokens[f"{side}_ids"]) for side in ("chosen", "rejected")] == [3, 3]
    with pytest.raises(BadRowError, match="leaves no room"):
        tokenize_pair(pair, tokenizer, prompt)
    with pytest.raises(BadRowError, match="identical within"):
        tokenize_pair(pair, tokenizer, prompt + 1)


def test_split_is_by_group_and_seed() -> None:
    data = DataConfig(files=("x",), validation_fraction=0.2, test_fraction=0.1)
    splits = [split_of(f"group {i}", data, 0) for i in range(3000)]
    assert splits == [split_of(f"group {i}", data, 0) for i in range(3000)]
    assert splits != [split_of(f"group {i}", data, 1) for i in range(3000)]
    assert splits.count("validation") / 3000 == pytest.approx(0.2, abs=0.03)
    assert splits.count("test") / 3000 == pytest.approx(0.1, abs=0.03)


def test_a_template_that_refuses_a_row_rejects_it(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRowError, match="roles must alternate"):
        tokenize_pair(messages(prompt="p", chosen="a", rejected="b"), strict, 64)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
class TestStage:
    def run(
        self, raw: dict[str, Any], rows: list[Any], tmp_path: Path, **data: Any
    ) -> tuple[dict[str, Any], pa.Table, pa.Table]:
        raw["data"] |= {"files": [str(write_jsonl(tmp_path / "in.jsonl", rows))], "keep_columns": [], **data}
        raw["evaluate"] = {}
        folder = pairs.run(parse_config(raw))
        manifest = read_manifest(folder)
        assert manifest is not None
        tables = [pq.read_table(file) for file in sorted(parquet_folder(folder).glob("*.parquet"))]
        return manifest["results"], pa.concat_tables(tables), pq.read_table(folder / "rejects.parquet")

    def test_good_rows_and_rejects(self, raw_config: dict[str, Any], tmp_path: Path) -> None:
        good = make_rows(60)
        bad = [
            "{not json",
            {"prompt": "", "chosen": "a", "rejected": "b"},
            "[1]",
            {**good[0], "chosen": good[0]["rejected"]},
        ]
        rows = [*good[:30], *bad, *good[30:], good[5], good[5], {**good[1], "prompt": "film " * 90}]
        results, table, rejects = self.run(raw_config, rows, tmp_path)
        assert table.num_rows == 62
        assert sum(results["pairs"].values()) == 62
        assert table["prompt"].to_pylist()[:60] == [row["prompt"] for row in good]
        ids = table["pair_id"].to_pylist()
        assert len(set(ids)) == 62
        assert [name.rsplit("-")[1] for name in (ids[5], ids[60], ids[61])] == ["0", "1", "2"]
        assert len({name.rsplit("-")[0] for name in (ids[5], ids[60], ids[61])}) == 1
        assert rejects["row"].to_pylist() == [30, 31, 32, 33, 66]
        reasons = rejects["reason"].to_pylist()
        assert "no JSON" in reasons[0]
        assert "leaves no room" in reasons[-1]
        assert sum(results["rejects"].values()) == 5

    def test_groups_never_part(self, raw_config: dict[str, Any], tmp_path: Path) -> None:
        rows = [{**row, "user": f"u{i % 20}"} for i, row in enumerate(make_rows(100))]
        _, table, _ = self.run(raw_config, rows, tmp_path, group_column="user")
        splits: dict[str, set[str]] = {}
        for group, split in zip(table["group"].to_pylist(), table["split"].to_pylist(), strict=True):
            splits.setdefault(group, set()).add(split)
        assert len(splits) == 20
        assert all(len(own) == 1 for own in splits.values())

    def test_split_column_and_conversations_from_parquet(self, raw_config: dict[str, Any], tmp_path: Path) -> None:
        rows = [
            {**row, "part": ["train", "validation", "test"][i % 3]}
            for i, row in enumerate(make_rows(30, conversational=True))
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
        raw_config["data"] |= {"files": [str(tmp_path / "in.parquet")], "split_column": "part", "keep_columns": []}
        raw_config["evaluate"] = {}
        folder = pairs.run(parse_config(raw_config))
        table = read_split(parquet_folder(folder), "test", ("prompt", "chosen"))
        assert table["prompt"].to_pylist() == [row["prompt"] for row in rows[2::3]]

    def test_messages_without_a_chat_template(
        self, raw_config: dict[str, Any], model_folder: Path, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare"
        shutil.copytree(model_folder, bare)
        (bare / "chat_template.jinja").unlink()
        raw_config["model"]["model_name_or_path"] = str(bare)
        with pytest.raises(UserError, match=r"set model\.chat_template_path"):
            self.run(raw_config, make_rows(10, conversational=True), tmp_path)

    def test_no_usable_pair(self, raw_config: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no usable pair.*2 x chosen and rejected are identical"):
            self.run(raw_config, [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2, tmp_path)
        assert not (tmp_path / "tiny" / "pairs").exists()

    def test_one_prompt_for_all_is_told(self, raw_config: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"name a data\.group_column or data\.split_column"):
            self.run(raw_config, [{**row, "prompt": "same"} for row in make_rows(20)], tmp_path)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejekted": "b"}])
    with pytest.raises(UserError, match="no column 'rejected'; did you mean 'rejekted'"):
        pairs.check_files(DataConfig(files=(str(file),)))
    with pytest.raises(UserError, match="does not exist"):
        pairs.check_files(DataConfig(files=("/none.jsonl",)))
    with pytest.raises(UserError, match=r"must end in \.parquet or \.jsonl"):
        pairs.check_files(DataConfig(files=(__file__,)))
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(UserError, match="no Parquet file"):
        pairs.check_files(DataConfig(files=(str(tmp_path / "b.parquet"),)))
