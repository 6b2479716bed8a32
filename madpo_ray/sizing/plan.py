"""What a config's trainings and passes need on given GPUs: memory, settings that fit, hours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray.columns import CHOSEN_IDS, RESPONSE_IDS
from madpo_ray.config import Config, ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.models.source import check_code
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


def choose_lengths(
    config: Config, prompt_tokens: int | None = None, response_tokens: int | None = None
) -> Lengths:
    """Half of data.max_length for the prompt, and the rest for each response, unless given.

    Raises:
        UserError: the prompt leaves no token for a response.
    """
    max_length = config.data.max_length
    prompt = prompt_tokens or max_length // 2
    response = response_tokens or max_length - prompt
    if response < 1:
        raise UserError(
            f"--prompt-tokens: {prompt} leaves no response within data.max_length {max_length}: "
            "lower it, or give --response-tokens"
        )
    return Lengths(prompt, response)


def find_needs(config: Config, cluster: Cluster, lengths: Lengths) -> Needs:
    """What a config needs on a cluster. Reads the model's config.json, not its weights.

    Raises:
        UserError: the model is not found, or cannot be planned.
    """
    check_code(config.model)
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
        options["revision"] = options["code_revision"] = model.model_revision
    try:
        architecture = AutoConfig.from_pretrained(name, **options)
    # A folder, a file and the hub can fail in as many ways as they have parts.
    except Exception as error:
        raise UserError(
            f"model.model_name_or_path: the config.json of {path} cannot be read "
            f"({type(error).__name__}: {error})"
        ) from None
    if not isinstance(getattr(architecture.get_text_config(), "num_hidden_layers", None), int):
        raise UserError(f"{path}: a {architecture.model_type} model cannot be planned: no layers")
    return architecture


def _trainings(config: Config) -> Iterator[Training]:
    if config.sft is not None:
        merges = config.sft.use_peft
        yield Training(sft.STAGE.name, config.sft, "CAUSAL_LM", (CHOSEN_IDS,), 1, merges)
    if reward.STAGE.is_wanted(config):
        folds, merges = config.reward.folds, config.reward.use_peft
        yield Training(reward.STAGE.name, config.reward, "SEQ_CLS", RESPONSE_IDS, folds, merges)
    merges = config.train.use_peft and config.train.merge_adapter
    yield Training(train.STAGE.name, config.train, "CAUSAL_LM", RESPONSE_IDS, 1, merges)
