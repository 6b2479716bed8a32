"""`madpo-ray <command>`: parse, call, exit code. The commands come from the list of stages."""

import contextlib
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from madpo_ray import pipeline
from madpo_ray.config import Config, load_config
from madpo_ray.config.files import dump_config
from madpo_ray.config.options import describe_options
from madpo_ray.errors import ExitCode, Stopped, UserError
from madpo_ray.preview import preview
from madpo_ray.stages import evaluate, export, margins, train, tune
from madpo_ray.stages.stage import Stage

if TYPE_CHECKING:
    from rich.table import Table

console = Console(soft_wrap=not sys.stdout.isatty())
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Margin-Adaptive DPO on Ray: train a reward model on preference pairs, score every pair's "
        "margin once, then train a policy whose DPO loss is weighted by it.\n\n"
        "Start with: madpo-ray run --config FILE.yaml --dry-run"
    ),
)

ConfigFile = Annotated[
    Path, typer.Option("--config", help="YAML file with sections model, data, run, train, ...")
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", help="section.key=value, overrides the file; may be repeated"),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="print the resolved config, rows, steps and workers, and exit"),
]

Export = Annotated[
    Literal["trl"] | None,
    typer.Option("--export", help="then write the scored pairs as a data set for TRL"),
]

StageName = StrEnum("StageName", [stage.name for stage in pipeline.STAGES])  # type: ignore[misc]
Until = Annotated[
    StageName | None,
    typer.Option("--until", help="only this stage and those whose results it needs"),
]

# What a command does with its config, and with the time at which trainings save and stop.
Action = Callable[[Config, float | None], None]


def say(what: "str | Table") -> None:
    """Prints a line or a table. Text is printed as it is: square brackets are not markup."""
    if isinstance(what, str):
        console.print(what, markup=False, highlight=False)
    else:
        console.print(what)


def _add_command(
    name: str, description: str, stages: Callable[[Config], list[Stage]], action: Action
) -> None:
    """Adds a command with the flags that all commands share.

    Args:
        stages: what the command would run, for a dry run.
    """

    @app.command(name, help=description)
    def run(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006 (typer's way)
        _perform(config, overrides, dry_run, stages, action)


def _perform(
    config: Path,
    overrides: list[str],
    dry_run: bool,
    stages: Callable[[Config], list[Stage]],
    action: Action,
) -> None:
    """Loads the config, and does what a command does, or prints what it would do."""
    began = time.time()
    with exit_codes():
        loaded = load_config(config, overrides)
        if dry_run:
            print_preview(loaded, stages(loaded))
            return
        action(loaded, loaded.run.deadline(began))


def set_up_logging() -> None:
    """Warnings of libraries, and what this package reports; no bars unless on a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars are for terminals, too
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("madpo_ray").setLevel(logging.INFO)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what ends a command into a message without a traceback, and into its exit code."""
    set_up_logging()
    try:
        yield
    except UserError as error:
        _print_error(f"error: {error}", style="bold red")
        raise SystemExit(ExitCode.USER_ERROR) from None
    except Stopped as stopped:
        is_error = stopped.exit_code is ExitCode.FAILED
        _print_error(f"error: {stopped.message}" if is_error else stopped.message)
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt:
        _print_error("interrupted: the same command resumes")
        raise SystemExit(ExitCode.INTERRUPTED) from None


def print_preview(config: Config, stages: list[Stage]) -> None:
    """The resolved config, and what the stages would do."""
    found = preview(config, stages)  # first, since it may refuse the config
    say(dump_config(config))
    for line in found.lines():
        say(line)


def _print_error(message: str, style: str | None = None) -> None:
    errors = Console(stderr=True, soft_wrap=True)
    errors.print(message, style=style, markup=False, highlight=False)


def _run_stages(*stages: Stage) -> Action:
    def action(config: Config, deadline: float | None) -> None:
        for stage in stages:
            pipeline.run_stage(config, stage, say=say, deadline=deadline)

    return action


def _only(*stages: Stage) -> Callable[[Config], list[Stage]]:
    return lambda config: list(stages)


@app.command("run", help="Run all stages that the config asks for. Finished stages are skipped.")
def _run(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 (typer's way)
    dry_run: DryRun = False,
    until: Until = None,
) -> None:
    last = next((stage for stage in pipeline.STAGES if stage.name == until), None)

    def action(config: Config, deadline: float | None) -> None:
        pipeline.run_all(config, say=say, deadline=deadline, until=last)

    stages = functools.partial(pipeline.wanted_stages, until=last)
    _perform(config, overrides, dry_run, stages, action)


for _stage in pipeline.STAGES:
    if _stage not in (margins.STAGE, tune.STAGE):
        _add_command(_stage.name, _stage.help, _only(_stage), _run_stages(_stage))


@app.command(margins.STAGE.name, help=margins.STAGE.help)
def _margins(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 (typer's way)
    dry_run: DryRun = False,
    export_to: Export = None,
) -> None:
    stages = (margins.STAGE,) if export_to is None else (margins.STAGE, export.STAGE)
    _perform(config, overrides, dry_run, _only(*stages), _run_stages(*stages))


@app.command(tune.STAGE.name, help=tune.STAGE.help)
def _tune(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 (typer's way)
    dry_run: DryRun = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="then train and evaluate with the best settings")
    ] = False,
) -> None:
    def stages(config: Config) -> list[Stage]:
        after = (train.STAGE, evaluate.STAGE) if retrain else ()
        return [tune.STAGE, *(stage for stage in after if stage.is_wanted(config))]

    def action(config: Config, deadline: float | None) -> None:
        pipeline.check(config, stages(config))  # what the search is for can be wrong, too
        pipeline.run_stage(config, tune.STAGE, say=say, deadline=deadline)
        if retrain:
            best = tune.with_best(config)
            pipeline.run_all(best, say=say, deadline=best.run.deadline(time.time()))

    _perform(config, overrides, dry_run, stages, action)


@app.command("plan", help="What a config needs on given GPUs: memory, settings that fit, hours.")
def _plan(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 (typer's way)
    gpu: Annotated[str, typer.Option(help="such as A100-80G or H100-80G")] = "H100-80G",
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="default: cluster.num_workers, at most 8")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="default: as many as those need")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="of each pair; default: half of data.max_length")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="of each response; default: the rest")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="share of a GPU's peak that is reached")
    ] = 0.4,
) -> None:
    with exit_codes():
        loaded = load_config(config, overrides)
        # Torch and transformers take seconds to import.
        from madpo_ray.sizing.gpus import Cluster, find_gpu
        from madpo_ray.sizing.plan import choose_lengths, find_needs
        from madpo_ray.sizing.terminal import needs_tables

        num_workers = loaded.cluster.num_workers
        gpus_per_node = gpus_per_node or min(num_workers, 8)
        nodes = nodes or math.ceil(num_workers / gpus_per_node)
        cluster = Cluster(find_gpu(gpu), gpu, gpus_per_node, nodes, utilisation)
        lengths = choose_lengths(loaded, prompt_tokens, response_tokens)
        for part in needs_tables(find_needs(loaded, cluster, lengths), cluster):
            say(part)


@app.command("options", help="All keys of a config: their defaults, and what they mean.")
def _options(
    section: Annotated[str | None, typer.Argument(help="such as train; default: all")] = None,
) -> None:
    with exit_codes():
        say(describe_options(section))


@app.command("verify", help="Compare every file of a run with the hash that its manifest has.")
def _verify(
    run: Annotated[Path, typer.Argument(help="the run's folder: run.storage_path/run.name")],
) -> None:
    with exit_codes():
        pipeline.verify(run, say=say)


@app.command("report", help="One HTML page about a run, or several side by side.")
def _report(
    runs: Annotated[list[Path], typer.Argument(help="folders run.storage_path/run.name")],
    out: Annotated[
        Path | None, typer.Option(help="the page; default: report.html in the first run's folder")
    ] = None,
) -> None:
    with exit_codes():
        pipeline.report(runs, say=say, file=out)


def script_main(name: str) -> Callable[[], None]:
    """The entry point of a job's script: a command with its flags."""

    def entry() -> None:
        app([name, *sys.argv[1:]])

    return entry


def main() -> None:
    app()
