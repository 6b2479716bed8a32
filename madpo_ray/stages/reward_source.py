"""Where stage margins gets rewards from: stage reward, a classifier, a function, or the data.

Several classifiers and functions, and the trained model, may be one source: an ensemble.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray import columns
from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.config import Config, ModelConfig, kind_of
from madpo_ray.models.source import fetch_model, model_inputs
from madpo_ray.stages import reward
from madpo_ray.stages.reward import uses_rewards

if TYPE_CHECKING:
    from madpo_ray.scoring.scorers import Scorer

# What imports torch is imported inside functions.


def settings(config: Config) -> dict[str, Any]:
    """Where rewards come from, as far as no model that was trained here says so."""
    found = _describe(config.reward.source)
    if config.reward.source_kind == "columns":
        found["columns"] = list(config.reward.source_columns)
    if config.reward.ensemble:
        found["ensemble"] = [_describe(source) for source in config.reward.ensemble]
    return found


def _describe(source: str) -> dict[str, Any]:
    """A classifier's content counts, not its name."""
    kind = kind_of(source)
    return {"kind": kind, "function": source} if kind == "function" else {"kind": kind}


def content(config: Config) -> dict[str, Any]:
    """Hashes of classifiers, and of the files that functions are in."""
    if not uses_rewards(config):
        return {}
    found = {"reward": _content_of(config.reward.source, config)}
    for number, source in enumerate(config.reward.ensemble):
        found[f"ensemble[{number}]"] = _content_of(source, config)
    return {name: value for name, value in found.items() if value is not None}


def _content_of(source: str, config: Config) -> str | None:
    match kind_of(source):
        case "classifier":
            return model_inputs(_classifier(source, config), "SEQ_CLS").fingerprint
        case "function":
            from madpo_ray.scoring.judges import find_function

            file = inspect.getsourcefile(inspect.unwrap(find_function(source)))
            return hash_file(Path(file)) if file else None
    return None


def _classifier(source: str, config: Config) -> ModelConfig:
    """The sequence classifier that gives the rewards."""
    is_first = source == config.reward.source
    revision = config.reward.source_revision if is_first else "main"
    return ModelConfig(model_name_or_path=source, model_revision=revision)


def scorer(config: Config) -> "Scorer":
    """What gives the rewards, unless they are in the data."""
    from madpo_ray.scoring.scorers import EnsembleReward

    sources = (config.reward.source, *config.reward.ensemble)
    members = [_member(source, config) for source in sources]
    return members[0] if len(members) == 1 else EnsembleReward(members)


def _member(source: str, config: Config) -> "Scorer":
    from madpo_ray.scoring.judges import ClassifierReward, FunctionReward
    from madpo_ray.scoring.scorers import CrossFittedReward, TrainedReward

    limits = config.scoring.forward_limits
    match kind_of(source):
        case "classifier":
            classifier = _classifier(source, config)
            folder = fetch_model(classifier, "SEQ_CLS")
            return ClassifierReward(folder, classifier, **limits)
        case "function":
            return FunctionReward(source)
    trained = [
        TrainedReward(folder, config.model, columns=columns.REWARDS, **limits)
        for folder in reward.models(config)
    ]
    return trained[0] if len(trained) == 1 else CrossFittedReward(trained)
