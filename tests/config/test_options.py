"""The list of all keys is itself a config with the defaults."""

from typing import Any

import pytest
import yaml

from madpo_ray.config import Config
from madpo_ray.config.options import describe_options
from madpo_ray.errors import UserError


def test_lists_every_key_with_its_default() -> None:
    listed = yaml.safe_load(describe_options())
    assert listed["model"].pop("model_name_or_path") is None  # required
    assert listed["data"].pop("files") is None
    required: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": "a"},
        "data": {"files": ["b"]},
        "sft": {},
    }
    defaults = Config.model_validate(required).model_dump(mode="json")
    for name, section in listed.items():
        for key in required.get(name, {}):
            defaults[name].pop(key)
        assert section == defaults[name]
    assert listed.keys() == Config.model_fields.keys()


def test_says_what_a_section_switches_on() -> None:
    listed = describe_options("sft")
    assert listed.startswith("# Without this section, as by default, the model itself is the init")
    assert "\nsft:\n" in listed


def test_says_what_a_key_means() -> None:
    lines = describe_options("train").splitlines()
    assert lines[0] == "train:"
    place = lines.index("  lr_scheduler_type: cosine")
    meaning = "of the learning rate, after the warm-up"
    choices = "one of cosine, linear, constant_with_warmup, constant"
    assert lines[place - 1] == f"  # {meaning} ({choices})"
    assert max(map(len, lines)) <= 100


def test_unknown_section() -> None:
    with pytest.raises(UserError, match="no section 'trian'; did you mean 'train'"):
        describe_options("trian")
