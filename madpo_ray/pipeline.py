"""The stages in their order: what is pending, run one, run all. Read this first.

    pairs      read, check, tokenise and split preference pairs
    sft        optional: fine-tune the initial policy on the chosen responses
    reward     train a reward model, if the loss uses margins
    margins    score every pair once: reward margin and reference log-probs
    train      train the policy on them
    evaluate   compare policy and reference on the test split
    tune       search settings of `train` over the same margins; by its own command, or --until
    export     the scored pairs as a data set for TRL; likewise

With `margins.mode: stream`, `train` runs before `margins`, which then collects what was scored.

A stage reads the results of earlier stages from their folders and writes its own. It is finished
when its manifest exists; the manifest records what it was made from.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from madpo_ray.artifacts.building import check_trusted, check_writable
from madpo_ray.artifacts.hashes import MANIFEST
from madpo_ray.artifacts.lock import locked
from madpo_ray.artifacts.manifest import (
    changed_since,
    damage,
    differences,
    read_manifest,
    refuse_changed_content,
)
from madpo_ray.cluster.connection import connected
from madpo_ray.config import Config, save_config
from madpo_ray.config.files import dump_config
from madpo_ray.disk import stopping_on_disk_errors
from madpo_ray.errors import ExitCode, Stopped, UserError
from madpo_ray.stages import evaluate, export, margins, pairs, reward, sft, train, tune
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
    export.STAGE,
)

REPORT_FILE = "report.html"

Say = Callable[["str | Table"], None]  # where progress and results are printed


def wanted_stages(config: Config, until: Stage | None = None) -> list[Stage]:
    """The stages of `madpo-ray run`, in order; with `until` that one and what its result needs."""
    if until is not None:
        return _with_needed(config, until)
    stages = [stage for stage in STAGES if stage.is_wanted(config)]
    return _in_order(config, stages)


def _with_needed(config: Config, last: Stage) -> list[Stage]:
    found = {last.name}
    stages: list[Stage] = []
    for stage in reversed(STAGES):
        if stage.name in found:
            stages.insert(0, stage)
            found |= {one.name for one in stage.needed(config)}
    return _in_order(config, stages)


def _in_order(config: Config, stages: list[Stage]) -> list[Stage]:
    if config.margins.mode != "stream" or not {train.STAGE, margins.STAGE} <= set(stages):
        return stages
    # Training scores the pairs; then margins collects them.
    others = [stage for stage in stages if stage is not margins.STAGE]
    end = others.index(train.STAGE) + 1
    return [*others[:end], margins.STAGE, *others[end:]]


def pending(config: Config, until: Stage | None = None) -> list[Stage]:
    """The wanted stages that are not finished for this config."""
    return [stage for stage in wanted_stages(config, until) if not stage.is_finished(config)]


def check(config: Config, stages: Sequence[Stage]) -> None:
    """Asks every stage for what can be wrong before the first one starts. Raises UserError."""
    check_trusted(config.run.folder)
    check_writable(config.run.folder)
    for stage in dict.fromkeys((pairs.STAGE, *stages)):
        stage.check(config)


def run_all(
    config: Config, *, say: Say, deadline: float | None = None, until: Stage | None = None
) -> None:
    """Runs the pending stages. A stage is redone if its settings or an earlier result changed.

    Args:
        say: gets lines and tables for the terminal.
        until: the last stage; None: all that the config asks for.
        deadline: time.time() at which a training saves and stops.

    Raises:
        UserError: the input or config is wrong, what the config points to changed under it, or
            another command writes the run.
        Stopped: SIGTERM or the deadline came, and what was running has saved.
    """
    stages = wanted_stages(config, until)
    check(config, stages)
    folder = config.run.folder
    config_file = folder / "config.yaml"
    names = "every stage" if until is None else ", ".join(stage.name for stage in stages)
    nothing_to_do = f"nothing to do: {names} in {folder} is done for this config"
    has_leftovers = any(stage.has_leftovers(config) for stage in stages)
    if not has_leftovers and not pending(config, until) and _holds(config_file, config):
        say(nothing_to_do)
        _report_if_missing(folder, say)
        return

    with stopping_on_disk_errors(folder), locked(folder, "run", say=say):
        # What is left, and why.
        for stage in stages:
            stage.recover(config)
        todo = pending(config, until)
        for stage in todo:
            explain_redo(config, stage, say)
        save_config(config, config_file)
        if not todo:
            say(nothing_to_do)
            _report_if_missing(folder, say)
            return

        streams = any(stage.streams(config) for stage in todo)
        dashboard = any(stage.uses_dashboard for stage in todo)
        with connected(config.cluster, actors=config.actors, streams=streams, dashboard=dashboard):
            for stage in stages:
                if stage in todo:
                    _run(config, stage, say, deadline)
                    check(config, stages)  # again, with what this result shows
                else:
                    say(f"{stage.name}: done already")
        report([folder], say=say)


def _report_if_missing(folder: Path, say: Say) -> None:
    """A command may have ended before it wrote the report."""
    if not (folder / REPORT_FILE).exists():
        report([folder], say=say)


def report(runs: Sequence[Path], *, say: Say, file: Path | None = None) -> None:
    """Writes one HTML page about finished stages of some runs, and prints its path.

    Args:
        file: by default `report.html` in the folder of the first run.

    Raises:
        UserError: a folder has no finished stage.
    """
    from madpo_ray.report.page import write_report  # takes seconds to import

    file = runs[0] / REPORT_FILE if file is None else file
    write_report(runs, STAGES, file)
    say(f"report: {file}")


def run_stage(config: Config, stage: Stage, *, say: Say, deadline: float | None = None) -> None:
    """Runs one stage, unless its result is there for this config. Raises as `run_all` does."""
    check(config, [stage])
    if not stage.has_leftovers(config) and _say_if_done(config, stage, say):
        return
    folder = config.run.folder
    with stopping_on_disk_errors(folder), locked(folder, stage.name, say=say):
        stage.recover(config)
        if _say_if_done(config, stage, say):
            return
        explain_redo(config, stage, say)
        _run(config, stage, say, deadline)


def _holds(file: Path, config: Config) -> bool:
    """Whether a file holds this config."""
    try:
        return file.read_text(encoding="utf-8") == dump_config(config)
    except (OSError, ValueError):  # missing or damaged
        return False


def _say_if_done(config: Config, stage: Stage, say: Say) -> bool:
    is_done = stage.is_finished(config)
    if is_done:
        say(f"{stage.name}: done already, in {stage.folder(config)}")
    return is_done


def verify(run: Path, *, say: Say) -> None:
    """Reads every file of a run's finished results and compares it with its hash.

    Raises:
        UserError: the folder has no result.
        Stopped: a file is missing or differs. The lines printed before name each one.
    """
    folders = sorted(
        folder for folder in (*run.glob("*/"), *run.glob("scores/*/")) if _is_result(folder)
    )
    if not folders:
        raise UserError(f"{run} has no finished stage: give the folder storage_path/name of a run")

    num_damaged = 0
    for folder in folders:
        manifest = read_manifest(folder)
        notes = "intact"
        if manifest is None:
            lost = [f"{MANIFEST} is missing or cannot be read"]
        else:
            lost = damage(folder, compare_hashes=True)
            upstream = manifest["inputs"].get("upstream", {})
            missing = [name for name in upstream if not (run / name).is_dir()]
            lost += [f"{name}, which it was made from, is missing" for name in missing]
            if not lost and (changed := changed_since(run, upstream)):
                notes = f"intact, but made from an earlier {' and '.join(changed)}"
        say(f"{folder.relative_to(run)}: {'; '.join(lost) or notes}")
        num_damaged += len(lost)
    if num_damaged:
        raise Stopped(
            f"{run}: files that differ from their manifests: {num_damaged}. `madpo-ray run` "
            "repeats stages whose files are missing or have another size; delete the folder of any "
            "other damaged stage first",
            ExitCode.FAILED,
        )


def _is_result(folder: Path) -> bool:
    """Whether a folder has, or should have, a manifest, and is not being built or deleted."""
    name = folder.name
    if name.startswith(".") or name.endswith((".partial", ".old")):
        return False
    return (folder / MANIFEST).exists() or name in {stage.name for stage in STAGES}


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
    reasons = "\n  ".join(map(str, differences(folder, inputs) or damage(folder)))
    say(f"{stage.name}: redone because of\n  {reasons}")


def _run(config: Config, stage: Stage, say: Say, deadline: float | None) -> None:
    say(f"{stage.name}: running")
    began = time.monotonic()
    results = stage.run(config, deadline=deadline)
    for line in stage.describe(results):
        say(f"{stage.name}: {line}" if isinstance(line, str) else line)
    say(f"{stage.name}: {time.monotonic() - began:.0f} s")
