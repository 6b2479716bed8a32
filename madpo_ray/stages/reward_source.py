"""Where stage margins gets rewards from: stage reward, a classifier, a function, or the data."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray import columns
from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.config import Config, ModelConfig
from madpo_ray.models.source import fetch_model, model_inputs
from madpo_ray.stages import reward
from madpo_ray.stages.reward import uses_rewards

if TYPE_CHECKING:
    from madpo_ray.scoring.scorers import Scorer

# What imports torch is imported inside functions.


def settings(config: Config) -> dict[str, Any]:
    """Where rewards come from, if not from a model that was trained here."""
    kind = config.reward.source_kind
    found: dict[str, Any] = {"kind": kind}
    if kind == "columns":
        found["columns"] = list(config.reward.source_columns)
    if kind == "function":
        found["function"] = config.reward.source
    return found


def content(config: Config) -> dict[str, Any]:
    """Hashes of a classifier, or of the file that a function is in."""
    if not uses_rewards(config):
        return {}
    match config.reward.source_kind:
        case "classifier":
            return {"reward": model_inputs(_classifier(config), "SEQ_CLS").fingerprint}
        case "function":
            from madpo_ray.scoring.judges import find_function

            file = inspect.getsourcefile(inspect.unwrap(find_function(config.reward.source)))
            return {"reward": hash_file(Path(file))} if file else {}
    return {}


def _classifier(config: Config) -> ModelConfig:
    """The sequence classifier that gives the rewards."""
    settings = config.reward
    return ModelConfig(model_name_or_path=settings.source, model_revision=settings.source_revision)


def scorer(config: Config) -> "Scorer":
    """What gives the rewards, unless they are in the data."""
    from madpo_ray.scoring.judges import ClassifierReward, FunctionReward
    from madpo_ray.scoring.scorers import CrossFittedReward, TrainedReward

    batch_size = config.scoring.per_device_batch_size
    match config.reward.source_kind:
        case "classifier":
            classifier = _classifier(config)
            folder = fetch_model(classifier, "SEQ_CLS")
            return ClassifierReward(folder, classifier, batch_size=batch_size)
        case "function":
            return FunctionReward(config.reward.source)
    trained = [
        TrainedReward(folder, config.model, columns=columns.REWARDS, batch_size=batch_size)
        for folder in reward.models(config)
    ]
    return trained[0] if len(trained) == 1 else CrossFittedReward(trained)
