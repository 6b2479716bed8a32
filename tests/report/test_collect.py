"""What a report reads of a run's folder."""

import json
from pathlib import Path

from madpo_ray.report.collect import collect
from madpo_ray.stages import evaluate


def test_names_settings_that_config_yaml_no_longer_holds(tmp_path: Path) -> None:
    """The config is that of the last command, which may have ended before this stage."""
    settings = {"seed": 0, "evaluate": {"num_samples": 8, "max_new_tokens": 4}}
    folder = tmp_path / evaluate.STAGE.name
    folder.mkdir()
    manifest = {"inputs": {"settings": settings}, "results": {}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "config.yaml").write_text("evaluate:\n  num_samples: 9\n  max_new_tokens: 4\n")
    (stage,) = collect(tmp_path, [evaluate.STAGE]).stages
    assert stage.lines == ["made with evaluate.num_samples 8, not 9 as in config.yaml"]
