"""Whether a folder holds the complete weights of a model, found without reading them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from madpo_ray.config import ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.models.loading import REWARD_HEAD, TaskType, load_exactly
from madpo_ray.models.source import read_json


def check_weights(folder: Path, model: ModelConfig, *, task_type: TaskType) -> None:
    """Raises UserError if the folder lacks weights of the model. Reads names and shapes only."""
    new = (REWARD_HEAD,) if task_type == "SEQ_CLS" else ()
    labels = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
    plain = {"attn_implementation": "eager", "load_in_4bit": False, "use_liger_kernel": False}
    eager = model.model_copy(update=plain)
    with _explaining(str(folder)):
        load_exactly(task_type, folder, eager, new, device_map="meta", **labels)


def check_classifier(folder: Path, model: ModelConfig, *, key: str) -> None:
    """Raises UserError if the folder is no classifier with one label. Reads no weights.

    Args:
        key: of the config, for messages.
    """
    wrap = f"give a function that reads it, {key}: module:function"
    config = read_json(folder / "config.json")
    labels = config.get("id2label")
    if labels and len(labels) != 1:
        raise UserError(f"{key}: {folder} gives {len(labels)} numbers, not one reward: {wrap}")
    eager = model.model_copy(update={"attn_implementation": "eager"})
    with _explaining(f"{key}: {folder}"):
        try:
            load_exactly("SEQ_CLS", folder, eager, device_map="meta", dtype="auto", num_labels=1)
        except ValueError as error:
            if "auto_map" not in config:
                raise
            message = f"{key}: {folder} needs code of its own, which is not run for rewards: {wrap}"
            raise UserError(message) from error


@contextlib.contextmanager
def _explaining(where: str) -> Iterator[None]:
    """Failures of loading in the block are UserErrors: a folder breaks in as many ways as it has
    files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from None
