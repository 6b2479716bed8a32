"""Every setting once: default, unit, bounds, meaning. Imports neither torch, ray nor deepspeed."""

from madpo_ray.config.base import Section
from madpo_ray.config.evaluation import (
    ActorPool,
    EvaluateConfig,
    ForwardOptions,
    MarginsConfig,
    ScoringConfig,
)
from madpo_ray.config.files import load_config, parse_config, save_config, with_changes
from madpo_ray.config.inputs import (
    ClusterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    is_remote,
)
from madpo_ray.config.reward import RewardConfig, kind_of
from madpo_ray.config.root import Config
from madpo_ray.config.search import SEARCH_SPACES, SEED, Domain, TuneConfig
from madpo_ray.config.training import LossType, PolicyConfig, SFTConfig, TrainingConfig

__all__ = [
    "SEARCH_SPACES",
    "SEED",
    "ActorPool",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "Domain",
    "EvaluateConfig",
    "ForwardOptions",
    "LossType",
    "MarginsConfig",
    "ModelConfig",
    "PolicyConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "ScoringConfig",
    "Section",
    "TrainingConfig",
    "TuneConfig",
    "is_remote",
    "kind_of",
    "load_config",
    "parse_config",
    "save_config",
    "with_changes",
]
