"""What a model needs, from its config.json alone: parameters, FLOPs, activations.

The model is built and run on PyTorch's fake tensors, which have shapes and no memory.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from madpo_ray.columns import CHOSEN_IDS, PROMPT_IDS, REJECTED_IDS, RESPONSE_IDS
from madpo_ray.config import ModelConfig, TrainingConfig
from madpo_ray.data.batching import MicroBatch, collate
from madpo_ray.data.order import count_tokens
from madpo_ray.errors import UserError
from madpo_ray.models.attention import assumed_gpu, may_pack
from madpo_ray.models.flops import ModelFlops
from madpo_ray.models.loading import AUTO_CLASSES, DTYPES, TaskType, remote_code, transformer_of
from madpo_ray.models.logprobs import TOKENS_PER_CHUNK, ResponseLogps, ResponseRewards
from madpo_ray.models.preparing import prepare_for_training
from madpo_ray.sizing.peak import peak_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The activations of a deeper model are extrapolated from these two numbers of layers: every layer
# adds the same.
FEW_LAYERS = 2
MORE_LAYERS = 4


class Shape(NamedTuple):
    """A micro-batch: equal pairs, in tokens."""

    pairs: int
    prompt_tokens: int
    response_tokens: int


class Lengths(NamedTuple):
    """Of every pair, in tokens."""

    prompt: int
    response: int

    def tokens_of_pair(self, num_responses: int, *, packed: bool) -> int:
        """Tokens that a model reads for a pair."""
        lengths = np.array([[self.prompt] + num_responses * [self.response]])
        return int(count_tokens(lengths, packed=packed)[0])

    def shape(
        self,
        num_pairs: int,
        max_tokens: int | None,
        *,
        packed: bool,
        num_responses: int = 2,
        max_pairs: int | None = None,
    ) -> Shape:
        """A micro-batch of `num_pairs`, or of as many as a budget of tokens has room for.

        Args:
            max_pairs: an upper bound, such as the pairs of a step.
        """
        if max_tokens is not None:
            num_pairs = max(1, max_tokens // self.tokens_of_pair(num_responses, packed=packed))
        return Shape(min(num_pairs, max_pairs or num_pairs), self.prompt, self.response)


@dataclass(frozen=True)
class Footprint:
    """What one micro-batch and its model need, on one device, before anything is sharded."""

    parameters: int  # elements, frozen ones included
    trained: int  # elements
    largest: int  # elements of the largest tensor
    in_four_bits: int  # elements of the weights that model.load_in_4bit shrinks
    activations: int  # bytes at the peak of a micro-batch, without weights and their gradients
    flops: float  # of a micro-batch
    tokens: int  # that the model reads for a micro-batch


def reads_packed_rows(architecture: "PretrainedConfig", model: ModelConfig) -> bool:
    """Whether a model reads the pairs of a micro-batch as one row, as far as its config shows.

    Its first layers try it, as all do at load (`models.reading.find_reading`).
    """
    if not may_pack(model, architecture):
        return False
    first_layers = _with_layers(architecture, 1)
    first_layers.get_text_config().use_cache = False
    with torch.device("meta"):
        module = _module(first_layers, model, "CAUSAL_LM", None, TOKENS_PER_CHUNK["cpu"])
    try:
        peak_bytes(module, _micro_batch(Shape(1, 2, 2), RESPONSE_IDS, packed=True))
    except RuntimeError:  # of models.attention: its layers cannot
        return False
    return True


def measure_footprint(
    architecture: "PretrainedConfig",
    model: ModelConfig,
    shape: Shape,
    *,
    task_type: TaskType,
    settings: TrainingConfig | None,
    packed: bool,
    responses: tuple[str, ...] = RESPONSE_IDS,
    on_gpu: bool = True,
) -> Footprint:
    """The footprint of a forward and backward, or, without settings, of a forward.

    Args:
        architecture: transformers' config of the model.
        packed: what `reads_packed_rows` says.
        responses: what is read of a pair.
        on_gpu: whether attention and chunks of logits are those of a GPU.

    Raises:
        UserError: the model is a mixture of experts: what they compute depends on their routing.
    """
    architecture = copy.deepcopy(architecture)
    text = architecture.get_text_config()
    if _has_experts(text.to_dict()):
        raise UserError(
            f"a {architecture.model_type} model cannot be planned: it is a mixture of experts, and "
            "which of them compute is known only while it runs"
        )
    text.use_cache = False
    batch = _micro_batch(shape, responses, packed=packed)
    tokens_per_chunk = TOKENS_PER_CHUNK["cuda" if on_gpu else "cpu"]

    def build(num_layers: int) -> Any:
        shortened = _with_layers(architecture, num_layers)
        with torch.device("meta"):
            return _module(shortened, model, task_type, settings, tokens_per_chunk)

    def peak_of(num_layers: int) -> int:
        with assumed_gpu() if on_gpu else contextlib.nullcontext():
            return peak_bytes(build(num_layers), batch)

    complete = build(text.num_hidden_layers)
    is_quantized = model.load_in_4bit and task_type == "CAUSAL_LM"
    sizes = [(p.numel(), p.requires_grad) for p in complete.parameters()]
    return Footprint(
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, is_trained in sizes if is_trained),
        largest=max(size for size, _ in sizes),
        in_four_bits=_count_quantized(complete.model) if is_quantized else 0,
        activations=_extrapolated(peak_of, text, settings),
        flops=ModelFlops(complete.model)(batch),
        tokens=batch.input_ids.numel(),
    )


def _extrapolated(
    peak_of: Callable[[int], int], text: "PretrainedConfig", settings: TrainingConfig | None
) -> int:
    """The peak of all layers; if all add the same, from those of the first few."""
    num_layers: int = text.num_hidden_layers
    types = set(getattr(text, "layer_types", None) or [])
    layers_differ = not types <= {"full_attention", "sliding_attention"}
    if getattr(text, "num_kv_shared_layers", None):  # the last layers read what others made
        layers_differ = True
    if settings is not None and settings.lora_layers_to_transform:
        layers_differ = True
    if num_layers <= MORE_LAYERS or layers_differ:
        return peak_of(num_layers)
    few = peak_of(FEW_LAYERS)
    per_layer = (peak_of(MORE_LAYERS) - few) / (MORE_LAYERS - FEW_LAYERS)
    return round(few + per_layer * (num_layers - FEW_LAYERS))


def _has_experts(settings: dict[str, Any]) -> bool:
    for name, value in settings.items():
        if isinstance(value, dict) and _has_experts(value):
            return True
        if "experts" in str(name) and value:
            return True
    return False


def _with_layers(architecture: "PretrainedConfig", num_layers: int) -> "PretrainedConfig":
    """The architecture with its first layers only."""
    shortened = copy.deepcopy(architecture)
    text = shortened.get_text_config()
    all_layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == all_layers:  # one entry per layer
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    if num_layers < all_layers and getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0  # the last layers do that
    return shortened


def _count_quantized(model: Any) -> int:
    """Elements of frozen linear layers but the head, which QLoRA keeps in 4 bits."""
    head = transformer_of(model).get_output_embeddings()
    return sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module is not head
    )


def _micro_batch(shape: Shape, responses: tuple[str, ...], *, packed: bool) -> MicroBatch:
    pair = {
        PROMPT_IDS: [0] * shape.prompt_tokens,
        CHOSEN_IDS: [0] * shape.response_tokens,
        REJECTED_IDS: [0] * shape.response_tokens,
    }
    return collate([pair] * shape.pairs, packed=packed, responses=responses)


def _module(
    architecture: "PretrainedConfig",
    model: ModelConfig,
    task_type: TaskType,
    settings: TrainingConfig | None,
    tokens_per_chunk: int,
) -> Any:
    """The module of a task, with fake weights."""
    import transformers

    if task_type == "SEQ_CLS":
        architecture.num_labels = 1
    auto_class = getattr(transformers, AUTO_CLASSES[task_type])
    loaded: nn.Module = auto_class.from_config(
        architecture,
        dtype=DTYPES[model.dtype],
        # Else transformers' choice: flash attention does not run on fake tensors.
        attn_implementation="eager" if model.attn_implementation == "eager" else None,
        **remote_code(model),
    )
    if settings is None:
        loaded.requires_grad_(False)
    else:
        loaded = prepare_for_training(loaded, settings, task_type=task_type)
        loaded.to(DTYPES[model.dtype])  # peft gives adapters the model's dtype, but not on meta
    if task_type == "SEQ_CLS":
        return ResponseRewards(loaded).train(settings is not None)
    return ResponseLogps(loaded, tokens_per_chunk=tokens_per_chunk).train(settings is not None)
