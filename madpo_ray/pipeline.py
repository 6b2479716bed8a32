"""The stages in their order: what is pending, run one, run all. Read this first.

    pairs      read, check, tokenise and split preference pairs
    sft        optional: fine-tune the initial policy on the chosen responses
    reward     train a reward model, if the loss uses margins
    margins    score every pair once: reward margin and reference log-probs
    train      train the policy on them
    evaluate   compare policy and reference on the test split
    tune       search settings of `train` over the same margins; only by its own command

A stage reads the results of earlier stages from their folders and writes its own. It is finished
when its manifest exists; the manifest records what it was made from.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from madpo_ray.artifacts.manifest import check_writable, differences, refuse_changed_content
from madpo_ray.cluster import connected
from madpo_ray.config import Config, save_config
from madpo_ray.stages import evaluate, margins, pairs, reward, sft, train, tune
from madpo_ray.stages.stage import Stage

if TYPE_CHECKING:
    from rich.table import Table

STAGES = (
    pairs.STAGE,
    sft.STAGE,
    reward.STAGE,
    margins.STAGE,
    train.STAGE,
    evaluate.STAGE,
    tune.STAGE,
)

Say = Callable[["str | Table"], None]  # where progress and results are printed


def wanted_stages(config: Config) -> list[Stage]:
    """The stages of `madpo-ray run`, in order."""
    return [stage for stage in STAGES if stage.is_wanted(config)]


def pending(config: Config) -> list[Stage]:
    """The stages of `madpo-ray run` that are not finished for this config."""
    return [stage for stage in wanted_stages(config) if not stage.is_finished(config)]


def check(config: Config, stages: Sequence[Stage]) -> None:
    """Asks every stage for what can be wrong before the first one starts. Raises UserError."""
    check_writable(config.run.folder)
    for stage in dict.fromkeys((pairs.STAGE, *stages)):
        stage.check(config)


def run_all(config: Config, *, say: Say, deadline: float | None = None) -> None:
    """Runs the pending stages. A stage is redone if its settings or an earlier result changed.

    Args:
        say: gets lines and tables for the terminal.
        deadline: time.time() at which a training saves and stops.

    Raises:
        UserError: the input or config is wrong, or what the config points to changed under it.
        Stopped: SIGTERM or the deadline came, and what was running has saved.
    """
    # What is wrong, what is left, and why.
    stages = wanted_stages(config)
    check(config, stages)
    todo = pending(config)
    if not todo:
        say(f"nothing to do: every stage in {config.run.folder} is done for this config")
        return

    for stage in todo:
        explain_redo(config, stage, say)
    save_config(config, config.run.folder / "config.yaml")
    with connected(config.cluster):
        for stage in stages:
            if stage in todo:
                _run(config, stage, say, deadline)
                check(config, stages)  # again: the result may show more
            else:
                say(f"{stage.name}: done already")


def run_stage(config: Config, stage: Stage, *, say: Say, deadline: float | None = None) -> None:
    """Runs one stage, unless its result is there for this config. Raises as `run_all` does."""
    check(config, [stage])
    if stage.is_finished(config):
        say(f"{stage.name}: done already, in {stage.folder(config)}")
        return
    explain_redo(config, stage, say)
    _run(config, stage, say, deadline)


def explain_redo(config: Config, stage: Stage, say: Say) -> None:
    """Prints why a stage that has a result is redone.

    Raises:
        UserError: the config is the same, and what it points to is not.
    """
    if not stage.exists(config):
        return
    folder = stage.folder(config)
    inputs = stage.inputs(config)
    refuse_changed_content(folder, inputs)
    reasons = "\n  ".join(map(str, differences(folder, inputs)))
    say(f"{stage.name}: redone because of\n  {reasons}")


def _run(config: Config, stage: Stage, say: Say, deadline: float | None) -> None:
    stage.require_upstream(config)
    say(f"{stage.name}: running")
    began = time.monotonic()
    results = stage.run(config, deadline=deadline)
    for line in stage.describe(results):
        say(f"{stage.name}: {line}" if isinstance(line, str) else line)
    say(f"{stage.name}: {time.monotonic() - began:.0f} s")
