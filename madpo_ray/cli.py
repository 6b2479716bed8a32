"""`madpo-ray <stage>`: parse, call the stage, exit code."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from madpo_ray.config import Config, ExitCode, Stopped, UserError
from madpo_ray.config_file import load_config

console = Console(soft_wrap=not sys.stdout.isatty())
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Margin-Adaptive DPO on Ray: train a reward model on preference pairs, score every pair's margin once, "
        "then train a policy whose DPO loss is weighted by it.\n\n"
        "Start with: madpo-ray run --config FILE.yaml --dry-run"
    ),
)

ConfigFile = Annotated[Path, typer.Option("--config", help="YAML file with sections model, data, run, train, ...")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, over the file; may be repeated")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config, rows, steps and workers, and exit")]


@app.command()
def run(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006 (typer's way)
    """All of it: pairs, reward model, margins, policy, evaluation. What is done already is left alone."""
    _main("run", config, overrides, dry_run)


@app.command()
def pairs(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Read and check preference pairs, tokenise and split them; bad rows go to rejects.parquet."""
    _main("pairs", config, overrides, dry_run)


@app.command()
def sft(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Fine-tune the start of policy and reference on the chosen responses, where the config has a section sft."""
    _main("sft", config, overrides, dry_run)


@app.command()
def reward(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Train the Bradley-Terry reward model and calibrate it."""
    _main("reward", config, overrides, dry_run)


@app.command()
def margins(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Score every pair's margin and the reference's log-probs, once."""
    _main("margins", config, overrides, dry_run)


@app.command()
def train(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Train the policy on the stored margins."""
    _main("train", config, overrides, dry_run)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Compare the policy with the reference on the test split."""
    _main("evaluate", config, overrides, dry_run)


@app.command()
def tune(config: ConfigFile, overrides: Overrides = [], dry_run: DryRun = False) -> None:  # noqa: B006
    """Search beta, c_min and c_max (or other keys of section train) over the stored margins."""
    _main("tune", config, overrides, dry_run)


def _main(command: str, file: Path, overrides: list[str], dry_run: bool) -> None:
    try:
        config = load_config(file, overrides)
        _call(command, config, dry_run)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="bold red", markup=False, highlight=False)
        raise typer.Exit(ExitCode.USER_ERROR) from None
    except Stopped as stopped:
        Console(stderr=True, soft_wrap=True).print(stopped.message, markup=False, highlight=False)
        raise typer.Exit(stopped.exit_code) from None


def _call(command: str, config: Config, dry_run: bool) -> None:
    # Torch, Ray and transformers take seconds to import: a wrong config is told before.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars, as ours, are for terminals
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("madpo_ray").setLevel(logging.INFO)
    from madpo_ray import pipeline, preview, tune

    search = pipeline.Stage("tune", tune.inputs, tune.folder, tune.run, tune.describe)
    stages = {**pipeline.STAGES, "tune": search}
    if dry_run:
        _print_preview(config, preview.preview(config, command))
    elif command == "run":
        pipeline.run_all(config, say=_say)
    else:
        pipeline.run_stage(config, stages[command], say=_say)


def _print_preview(config: Config, numbers: dict[str, Any]) -> None:
    _say(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    for name, value in numbers.items():
        _say(f"{name}: {value}")


def _say(what: Any) -> None:
    console.print(what, markup=False, highlight=False) if isinstance(what, str) else console.print(what)


def job(command: str) -> Callable[[], None]:
    """The entry point of a job's script: the same command with the same flags."""

    def entry() -> None:
        app([command, *sys.argv[1:]])

    return entry


def main() -> None:
    app()
