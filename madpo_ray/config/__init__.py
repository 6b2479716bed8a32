"""Every setting once: default, unit, bounds, meaning. Imports neither torch, ray nor deepspeed."""

from madpo_ray.config.base import Section
from madpo_ray.config.evaluation import (
    ActorPool,
    EvaluateConfig,
    MarginsConfig,
    ScoringConfig,
    TuneConfig,
)
from madpo_ray.config.files import load_config, parse_config, save_config, with_changes
from madpo_ray.config.inputs import ClusterConfig, DataConfig, ModelConfig, RunConfig
from madpo_ray.config.reward import RewardConfig
from madpo_ray.config.root import Config
from madpo_ray.config.training import (
    SEARCH_SPACES,
    LossType,
    PolicyConfig,
    Range,
    SFTConfig,
    TrainingConfig,
)

__all__ = [
    "SEARCH_SPACES",
    "ActorPool",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LossType",
    "MarginsConfig",
    "ModelConfig",
    "PolicyConfig",
    "Range",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "ScoringConfig",
    "Section",
    "TrainingConfig",
    "TuneConfig",
    "load_config",
    "parse_config",
    "save_config",
    "with_changes",
]
