"""Other finished runs, whose policies are compared with this one's."""

from pathlib import Path
from typing import Any

from madpo_ray.config import Config, load_config
from madpo_ray.errors import UserError
from madpo_ray.stages import train
from madpo_ray.stages.sft import initial_policy

KEY = "evaluate.compare_with"


def run_names(config: Config) -> dict[str, Path]:
    """The other runs' folders, by the names that tables show.

    Raises:
        UserError: two have the same name.
    """
    folders = [Path(folder) for folder in config.evaluate.compare_with]
    names = {folder.name: folder for folder in folders}
    if len(names) < len(folders) or {"policy", "reference"} & set(names):
        raise UserError(
            f"{KEY}: folders need different names, other than policy and reference: "
            f"{', '.join(folder.name for folder in folders)}"
        )
    return names


def open_run(folder: Path) -> Config:
    """The config of a run, at the place where the run is now.

    Raises:
        UserError: the folder is not a run.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{KEY}: {folder} has no config.yaml: it is not the folder of a run")
    config = load_config(file)
    run = config.run.model_copy(update={"name": folder.name, "storage_path": str(folder.parent)})
    return config.model_copy(update={"run": run})


def check_runs(config: Config) -> None:
    """Raises UserError if another run has no policy."""
    for folder in run_names(config).values():
        train.STAGE.require(open_run(folder))


def require_same_tokens(config: Config) -> None:
    """Raises UserError if a policy of another run has another tokenizer or chat template."""
    own = _tokens_of(initial_policy(config), config)
    for name, folder in run_names(config).items():
        other = open_run(folder)
        if _tokens_of(train.STAGE.model(other), other) != own:
            raise UserError(
                f"{KEY}: {name} has another tokenizer or chat template: its policy would read "
                "these prompts wrongly"
            )


def _tokens_of(folder: Path, config: Config) -> tuple[dict[str, int], str | None]:
    """What turns texts into tokens: the vocabulary and the template."""
    from madpo_ray.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder, config.model)
    return tokenizer.get_vocab(), tokenizer.chat_template


def runs_content(config: Config) -> dict[str, Any]:
    """What the other policies were made from."""
    return {
        f"run {name}": train.STAGE.inputs(open_run(folder)).fingerprint
        for name, folder in run_names(config).items()
    }
