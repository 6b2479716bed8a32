"""Folders whose weights are complete, and what is wrong with others."""

import json
import shutil
from pathlib import Path

import pytest

from madpo_ray.config import ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.models.checks import check_classifier, check_weights
from support.models import make_reward_model


def test_complete_model_passes(model_folder: Path) -> None:
    model = ModelConfig(model_name_or_path=str(model_folder))
    check_weights(model_folder, model, task_type="CAUSAL_LM")
    check_weights(model_folder, model, task_type="SEQ_CLS")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_broken_files_are_named(file: str, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    (folder / file).write_text('{"model_type": "llama", "hidden_size": "x"}')
    model = ModelConfig(model_name_or_path=str(folder))
    with pytest.raises(UserError, match=str(folder)):
        check_weights(folder, model, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"id2label": {"0": "bad", "1": "good"}},
            "gives 2 numbers, not one reward: give a function",
        ),
        (
            {
                "model_type": "their_own",
                "auto_map": {"AutoConfig": "own.Config"},
            },
            "needs code of its own, which is not run for rewards: give a function",
        ),
        ({"hidden_size": "x"}, "cannot be loaded"),
    ],
)
def test_classifier_that_gives_no_reward_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    make_reward_model().save_pretrained(tmp_path)
    settings = ModelConfig(model_name_or_path=str(tmp_path))
    check_classifier(tmp_path, settings, key="reward.source")

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"reward.source: {tmp_path} {message}"):
        check_classifier(tmp_path, settings, key="reward.source")
