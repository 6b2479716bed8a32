"""What a config's trainings and passes need on given GPUs: memory, settings that fit, hours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray.columns import CHOSEN_IDS, RESPONSE_IDS
from madpo_ray.config import Config, ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.sizing.footprint import Lengths
from madpo_ray.sizing.gpus import Cluster
from madpo_ray.sizing.passes import PassNeeds, pass_needs
from madpo_ray.sizing.trainings import Training, TrainingNeeds, training_needs
from madpo_ray.stages import reward, sft, train

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Needs:
    """What a config needs."""

    model_type: str
    dtype: str
    lengths: Lengths
    trainings: list[TrainingNeeds]
    passes: list[PassNeeds]


def default_lengths(config: Config) -> Lengths:
    """Half of data.max_length for the prompt, and half for each response."""
    prompt = config.data.max_length // 2
    return Lengths(prompt, config.data.max_length - prompt)


def find_needs(config: Config, cluster: Cluster, lengths: Lengths) -> Needs:
    """What a config needs on a cluster. Reads the model's config.json, not its weights.

    Raises:
        UserError: the model is not found, or cannot be planned.
    """
    architecture = load_planned_architecture(config.model)
    return Needs(
        model_type=architecture.model_type,
        dtype=config.model.dtype,
        lengths=lengths,
        trainings=[
            training_needs(one, config, architecture, cluster, lengths)
            for one in _trainings(config)
        ],
        passes=list(pass_needs(config, architecture, cluster, lengths)),
    )


def load_planned_architecture(model: ModelConfig) -> "PretrainedConfig":
    """transformers' config of a folder with a config.json, a .gguf file, or a hub name."""
    from transformers import AutoConfig

    path = Path(model.model_name_or_path)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    name = str(path)
    if path.suffix == ".gguf":
        name, options["gguf_file"] = str(path.parent), path.name
    elif not path.is_absolute():
        options["revision"] = model.model_revision
    try:
        return AutoConfig.from_pretrained(name, **options)
    # A folder, a file and the hub can fail in as many ways as they have parts.
    except Exception as error:
        raise UserError(
            f"model.model_name_or_path: the config.json of {path} cannot be read "
            f"({type(error).__name__}: {error})"
        ) from None


def _trainings(config: Config) -> Iterator[Training]:
    if config.sft is not None:
        yield Training(sft.STAGE.name, config.sft, "CAUSAL_LM", (CHOSEN_IDS,), config.sft.use_peft)
    if reward.STAGE.is_wanted(config):
        merged = config.reward.use_peft
        yield Training(reward.STAGE.name, config.reward, "SEQ_CLS", RESPONSE_IDS, merged)
    merged = config.train.use_peft and config.train.merge_adapter
    yield Training(train.STAGE.name, config.train, "CAUSAL_LM", RESPONSE_IDS, merged)
