"""Where stage margins gets rewards from: stage reward, a classifier, a function, or the data.

Several classifiers and functions, and the trained model, may be one source: an ensemble.
"""

from typing import TYPE_CHECKING, Any

from madpo_ray import columns
from madpo_ray.config import Config, kind_of
from madpo_ray.stages import reward
from madpo_ray.stages.judge_source import JudgeSource
from madpo_ray.stages.reward import uses_rewards

if TYPE_CHECKING:
    from madpo_ray.data.messages import Content
    from madpo_ray.scoring.scorers import Scorer

# What imports torch is imported inside functions.

JUDGES = ("classifier", "function")


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


def check(config: Config) -> None:
    """Raises UserError if a classifier or function is not there. The hub is not asked."""
    for source in (config.reward.source, *config.reward.ensemble):
        if kind_of(source) in JUDGES:
            _judge(source, config).check()


def check_reads(config: Config, prompt: "Content") -> None:
    """Raises UserError if a classifier cannot read such prompts."""
    for source in (config.reward.source, *config.reward.ensemble):
        if kind_of(source) in JUDGES:
            _judge(source, config).check_reads(prompt)


def content(config: Config) -> dict[str, Any]:
    """Hashes of classifiers, and of the files that functions are in."""
    if not uses_rewards(config):
        return {}
    found = {"reward": _content_of(config.reward.source, config)}
    for number, source in enumerate(config.reward.ensemble):
        found[f"ensemble[{number}]"] = _content_of(source, config)
    return {name: value for name, value in found.items() if value is not None}


def _content_of(source: str, config: Config) -> Any:
    return _judge(source, config).content() if kind_of(source) in JUDGES else None


def _judge(source: str, config: Config) -> JudgeSource:
    """A classifier or function that gives the rewards."""
    is_first = source == config.reward.source
    revision = config.reward.source_revision if is_first else "main"
    return JudgeSource(source, revision, key="reward.source" if is_first else "reward.ensemble")


def scorer(config: Config) -> "Scorer":
    """What gives the rewards, unless they are in the data."""
    from madpo_ray.scoring.scorers import EnsembleReward

    sources = (config.reward.source, *config.reward.ensemble)
    members = [_member(source, config) for source in sources]
    return members[0] if len(members) == 1 else EnsembleReward(members)


def _member(source: str, config: Config) -> "Scorer":
    from madpo_ray.scoring.scorers import CrossFittedReward, TrainedReward

    forward = config.scoring.forward
    if kind_of(source) in JUDGES:
        return _judge(source, config).scorer(forward)
    trained = [
        TrainedReward(folder, config.model, columns=columns.REWARDS, forward=forward)
        for folder in reward.models(config)
    ]
    return trained[0] if len(trained) == 1 else CrossFittedReward(trained)
