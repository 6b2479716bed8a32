"""What scoring and sampling need: models that are complete in each actor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from madpo_ray.config import Config
from madpo_ray.models.loading import TaskType
from madpo_ray.sizing.footprint import Footprint, Lengths, Shape, measure_footprint
from madpo_ray.sizing.gpus import Cluster
from madpo_ray.sizing.memory import BYTES, weight_bytes
from madpo_ray.stages import evaluate, margins, reward

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PassNeeds:
    """What a pass without a training needs in each actor."""

    name: str
    weights: int
    activations: int
    pairs_per_second: float | None

    @property
    def peak(self) -> int:
        return self.weights + self.activations


def pass_needs(
    config: Config, architecture: "PretrainedConfig", cluster: Cluster, lengths: Lengths
) -> Iterator[PassNeeds]:
    """Of stages margins and evaluate."""
    dtype = config.model.dtype
    scoring = config.scoring
    num_pairs = scoring.per_device_batch_size
    if scoring.max_tokens_per_device is not None:
        num_pairs = max(1, scoring.max_tokens_per_device // lengths.count(2))
    shape = Shape(num_pairs, lengths.prompt, lengths.response)

    def footprint(task_type: TaskType) -> Footprint:
        return measure_footprint(
            architecture,
            config.model,
            shape,
            task_type=task_type,
            settings=None,
        )

    # One pass has all models that are scored with. A merged reward model is float32.
    reference = footprint("CAUSAL_LM")
    reference_bytes = weight_bytes(reference, dtype)
    models = [(reference, reference_bytes)]
    if reward.STAGE.is_wanted(config):
        classifier = footprint("SEQ_CLS")
        size = weight_bytes(classifier, "float32" if config.reward.use_peft else dtype)
        models += [(classifier, size)] * config.reward.folds
    scored_with = models[:2]  # of several folds a pair is read by one
    yield PassNeeds(
        margins.STAGE.name,
        weights=sum(size for _, size in models),
        activations=max(one.activations for one, _ in models),
        pairs_per_second=shape.pairs
        * cluster.speed(dtype)
        / sum(one.flops for one, _ in scored_with),
    )

    # Samples of policy and reference, with their keys and values.
    evaluated = config.evaluate
    text = architecture.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = lengths.prompt + evaluated.max_new_tokens
    cached = 2 * text.num_hidden_layers * heads * channels * BYTES[dtype] * tokens
    yield PassNeeds(
        evaluate.STAGE.name,
        weights=2 * reference_bytes,
        activations=cached * evaluated.generation_batch_size,
        pairs_per_second=None,
    )
