"""The stages in order, and what of them a config still has to do."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from madpo_ray import evaluate, margins, models, pairs, reward, sft, train
from madpo_ray.artifacts import Inputs, check_writable, differences, is_finished, read_manifest
from madpo_ray.cluster import connected
from madpo_ray.config import Config, UserError


@dataclass(frozen=True)
class Stage:
    name: str
    inputs: Callable[[Config], Inputs]
    folder: Callable[[Config], Path]
    run: Callable[[Config], Path]
    describe: Callable[[Mapping[str, Any]], Any]


STAGES = {
    name: Stage(name, module.inputs, module.folder, module.run, describe)
    for name, module, describe in (
        ("pairs", pairs, pairs.describe),
        ("sft", sft, sft.describe),
        ("reward", reward, reward.describe),
        ("margins", margins, margins.describe),
        ("train", train, train.describe),
        ("evaluate", evaluate, evaluate.as_tables),
    )
}


def stages_of(config: Config) -> list[Stage]:
    """The stages that the config asks for."""
    return [stage for stage in STAGES.values() if stage.name != "sft" or config.sft is not None]


def check(config: Config) -> None:
    """Everything that can be wrong without loading a model. Raises UserError."""
    check_writable(config.run.folder)
    models.check_model(config.model)
    pairs.check_files(config.data)


def results(config: Config, stage: Stage) -> dict[str, Any]:
    """The results of a finished stage."""
    manifest = read_manifest(stage.folder(config))
    assert manifest is not None, f"{stage.name} has not run"
    return dict(manifest["results"])


def run_stage(config: Config, stage: Stage, *, say: Callable[[Any], None]) -> None:
    """Runs one stage, unless its artifact is there for this config; says why where it is made anew."""
    check(config)
    if is_finished(stage.folder(config), stage.inputs(config)):
        say(f"{stage.name}: done already, in {stage.folder(config)}")
        return
    _say_why(config, stage, say)
    _execute(config, stage, say)


def run_all(config: Config, *, say: Callable[[Any], None]) -> None:
    """Stages 1 to 5. What is done is left alone; the first stage that the config changes is redone, with all behind it.

    Raises:
        UserError: the run's folder was made from files or a package that have changed since under the same config.
    """
    check(config)
    todo = pending(config)
    if not todo:
        say(f"nothing to do: every stage in {config.run.folder} is done for this config")
        return
    _say_why(config, todo[0], say)
    with connected(config.cluster):
        for stage in stages_of(config):
            if stage in todo:
                _execute(config, stage, say)
            else:
                say(f"{stage.name}: done already")
    save_config(config, config.run.folder / "config.yaml")


def save_config(config: Config, path: Path) -> None:
    """The resolved config as a file that `--config` takes."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def pending(config: Config) -> list[Stage]:
    """The stages from the first unfinished one on."""
    stages = stages_of(config)
    for i, stage in enumerate(stages):
        if not is_finished(stage.folder(config), stage.inputs(config)):
            return stages[i:]
    return []


def _say_why(config: Config, stage: Stage, say: Callable[[Any], None]) -> None:
    """Says why a finished stage is redone; refuses where the config is the same and what it points to is not."""
    if read_manifest(stage.folder(config)) is None:
        return
    changes = differences(stage.folder(config), stage.inputs(config))
    reasons = "\n  ".join(changes)
    if all(change.startswith("content.") for change in changes):
        raise UserError(
            f"{stage.folder(config)} was made from other inputs, and the config is the same:\n  {reasons}\n"
            "give another run.name, or delete the folder to make it anew"
        )
    say(f"{stage.name}: redone, and what follows from it, because of\n  {reasons}")


def _execute(config: Config, stage: Stage, say: Callable[[Any], None]) -> None:
    say(f"{stage.name}: running")
    began = time.monotonic()
    stage.run(config)
    outcome = stage.describe(results(config, stage))
    for line in outcome if isinstance(outcome, list) else [f"{stage.name}: {outcome}"]:
        say(line)
    say(f"{stage.name}: {time.monotonic() - began:.0f} s")
