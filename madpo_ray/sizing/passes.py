"""What scoring and sampling need: models that are complete in each actor."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from madpo_ray.config import Config, ModelConfig
from madpo_ray.models.flops import layer_configs
from madpo_ray.models.loading import TaskType
from madpo_ray.sizing.footprint import Footprint, Lengths, measure_footprint, reads_packed_rows
from madpo_ray.sizing.gpus import Cluster
from madpo_ray.sizing.memory import BYTES, weight_bytes
from madpo_ray.stages import evaluate, margins, reward

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PassNeeds:
    """What a pass without a training needs on each GPU.

    Attributes:
        weights: in bytes; the average, if the layers are spread over several GPUs.
        activations: in bytes.
    """

    name: str
    weights: int
    activations: int
    pairs_per_second: float | None

    @property
    def peak(self) -> int:
        return self.weights + self.activations

    def placed(self, gpus_per_actor: float) -> "PassNeeds":
        """With that many GPUs for each actor: several actors on one, or one actor on several.

        The layers of a spread model run one after another, so that one GPU of an actor works.
        """
        if gpus_per_actor > 1:
            speed = self.pairs_per_second
            if speed is not None:
                speed /= gpus_per_actor
            weights = math.ceil(self.weights / gpus_per_actor)
            return dataclasses.replace(self, weights=weights, pairs_per_second=speed)
        together = max(1, math.floor(1 / gpus_per_actor))
        weights, activations = together * self.weights, together * self.activations
        return dataclasses.replace(self, weights=weights, activations=activations)


def _together(name: str, passes: Sequence[PassNeeds]) -> PassNeeds:
    """One pass with the models of all."""
    seconds = sum(1 / one.pairs_per_second for one in passes if one.pairs_per_second)
    return PassNeeds(
        name,
        weights=sum(one.weights for one in passes),
        activations=max(one.activations for one in passes),
        pairs_per_second=1 / seconds,
    )


def pass_needs(
    config: Config, architecture: "PretrainedConfig", cluster: Cluster, lengths: Lengths
) -> Iterator[PassNeeds]:
    """Scoring of stage margins and sampling of stage evaluate.

    Not counted: classifiers and functions of others, and the passes that score samples.
    """
    scoring = config.scoring
    packed = reads_packed_rows(architecture, config.model)
    shape = lengths.shape(
        scoring.per_device_batch_size, scoring.max_tokens_per_device, packed=packed
    )

    def footprint(model: ModelConfig, task_type: TaskType) -> Footprint:
        return measure_footprint(
            architecture, model, shape, task_type=task_type, settings=None, packed=packed
        )

    # Each pair is read with the reference and, of several folds, one reward model.
    name = margins.STAGE.name
    dtype = config.model.dtype
    reference = footprint(config.model, "CAUSAL_LM")
    reference_bytes = weight_bytes(reference, dtype)
    scorers = [
        PassNeeds(
            f"{name}: reference",
            reference_bytes,
            reference.activations,
            shape.pairs / (reference.flops / cluster.speed(dtype)),
        )
    ]
    if reward.STAGE.is_wanted(config):
        model = config.model.model_copy(update={"load_in_4bit": False})
        classifier = footprint(model, "SEQ_CLS")
        scorers.append(
            PassNeeds(
                f"{name}: reward",
                config.reward.folds * weight_bytes(classifier, dtype),
                classifier.activations,
                shape.pairs / (classifier.flops / cluster.speed(dtype)),
            )
        )
    gpus_per_actor = config.actors.num_gpus or 1.0
    passes = scorers if scoring.one_model_at_a_time else [_together(name, scorers)]
    for needs in passes:
        yield needs.placed(gpus_per_actor)

    # Samples of all policies, with the keys and values of one at a time.
    evaluated = config.evaluate
    num_policies = 2 + len(evaluated.compare_with)
    cache = evaluated.generation_batch_size * _cache_bytes(
        architecture, dtype, lengths.prompt + evaluated.max_new_tokens
    )
    weights = num_policies * reference_bytes
    sampling = PassNeeds(f"{evaluate.STAGE.name}: sampling", weights, cache, None)
    placed = sampling.placed(gpus_per_actor)
    if gpus_per_actor > 1:  # the cache of a layer is where the layer is
        placed = dataclasses.replace(placed, activations=math.ceil(cache / gpus_per_actor))
    yield placed


def _cache_bytes(architecture: "PretrainedConfig", dtype: str, num_tokens: int) -> int:
    """Keys and values of one sequence."""
    values = sum(map(_cached_values, layer_configs(architecture)))
    return values * BYTES[dtype] * num_tokens


def _cached_values(layer: "PretrainedConfig") -> int:
    """Of a token, in one layer."""
    num_heads = getattr(layer, "num_attention_heads", None)
    if not num_heads:  # no attention
        return 0
    if rank := getattr(layer, "kv_lora_rank", None):  # compressed keys and values
        return int(rank + layer.qk_rope_head_dim)
    heads = getattr(layer, "num_key_value_heads", None) or num_heads
    if getattr(layer, "multi_query", False) and not getattr(layer, "num_key_value_heads", None):
        heads = 1
    channels = getattr(layer, "head_dim", None) or layer.hidden_size // num_heads
    return int(2 * heads * channels)
