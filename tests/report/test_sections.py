"""The report of a finished run."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from madpo_ray import pipeline
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.pipeline import STAGES
from madpo_ray.report.collect import collect
from madpo_ray.report.parts import Section, content_text
from madpo_ray.report.sections import sections_of

Run = tuple[Config, list[str]]

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]


def titles(sections: list[Section]) -> list[str]:
    return [section.title for section in sections]


def test_run_writes_its_report(finished_run: Run) -> None:
    config, printed = finished_run
    file = config.run.folder / "report.html"
    assert printed[-1] == f"report: {file}"
    assert file.stat().st_size < 5 * 10**6


def test_every_part_of_a_run_is_shown(finished_run: Run) -> None:
    config, _ = finished_run
    run = collect(config.run.folder, STAGES)
    found = {section.title: section for section in sections_of([run])}
    assert list(found) == [
        *("Pipeline", "Config", "Training", "Margins", "Evaluation", "Samples"),
        "Suspicious pairs",
    ]
    stages = [row[0] for row in found["Pipeline"].tables[0].rows]
    assert stages == ["pairs", "reward", "margins", "train", "evaluate"]
    assert all(row[1] > 0 for row in found["Pipeline"].tables[0].rows)
    assert "train" in found["Pipeline"].tables[0].rows[0][3]
    assert len(found["Margins"].charts) == 3
    assert {chart.to_dict()["title"] for chart in found["Training"].charts} >= {
        "reward: Loss",
        "train: Loss",
        "train: Weights",
    }
    (samples,) = found["Samples"].tables
    assert samples.headings[0] == "prompt"
    assert len(samples.rows) == config.evaluate.num_samples
    evaluation = json.loads((config.run.folder / "evaluate" / "evaluation.json").read_text())
    assert found["Evaluation"].tables[0].rows[0][1] == evaluation["reference"]["accuracy"]


def test_rows_of_each_stage(finished_run: Run) -> None:
    config, _ = finished_run
    run = collect(config.run.folder, STAGES)
    rows = {stage.name: stage.rows for stage in run.stages}
    assert rows["pairs"] == rows["margins"] == 90
    assert rows["train"] == rows["reward"] == run.margins["splits"]["train"]["pairs"]
    assert rows["evaluate"] == 4


def test_several_runs_side_by_side(finished_run: Run, tmp_path: Path) -> None:
    config, _ = finished_run
    other = tmp_path / "other"
    shutil.copytree(config.run.folder, other, ignore=shutil.ignore_patterns("ray", "scores"))
    text = (other / "config.yaml").read_text().replace("beta: 0.1", "beta: 0.3")
    (other / "config.yaml").write_text(text)
    runs = [collect(config.run.folder, STAGES), collect(other, STAGES)]
    found = {section.title: section for section in sections_of(runs)}
    different = {row[0]: row[1:] for row in found["Config"].tables[0].rows}
    assert different["train.beta"] == ("0.1", "0.3")
    assert {"Margins of tiny", "Margins of other"} <= found.keys()
    printed: list[str] = []
    file = tmp_path / "both.html"
    pipeline.report(
        [config.run.folder, other], say=lambda what: printed.append(str(what)), file=file
    )
    assert "Margins of other" in file.read_text()


def test_unfinished_run_shows_what_there_is(finished_run: Run, tmp_path: Path) -> None:
    config, _ = finished_run
    shutil.copytree(config.run.folder / "pairs", tmp_path / "pairs")
    assert titles(sections_of([collect(tmp_path, STAGES)])) == ["Pipeline", "Config"]


def test_rejects_and_searches_are_shown(finished_run: Run) -> None:
    config, _ = finished_run
    run = copy.copy(collect(config.run.folder, STAGES))
    run.rejects = [{"stage": "pairs", "file": "a.jsonl", "row": 3, "reason": "chosen is missing"}]
    run.num_rejects = {"pairs": 5000}
    trial = {"trial": 1, "state": "complete", "train.beta": 0.1, "reward": 0.5, "error": None}
    run.search = {
        "trials": [trial],
        "keys": ["train.beta"],
        "objectives": ["reward"],
        "importances": {},
    }
    found = {section.title: section for section in sections_of([run])}
    assert found["Rejected rows"].tables[0].rows == [["pairs", "a.jsonl", 3, "chosen is missing"]]
    assert found["Rejected rows"].note == "The first of 5,000."
    assert found["Search"].tables[0].rows[0] == [1, "complete", 0.1, 0.5, "-"]
    assert len(found["Search"].charts) == 3


def test_messages_are_shown_with_all_that_they_hold() -> None:
    """Two responses may differ in a call of a tool only."""
    call = [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}]
    shown = content_text(json.dumps(call))
    assert shown == 'assistant: {"tool_calls": [{"name": "add", "arguments": {"x": 1}}]}'
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "x"}]}]
    assert content_text(json.dumps(parts)) == 'user: a{"type": "x"}'


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished stage"):
        collect(tmp_path, STAGES)
