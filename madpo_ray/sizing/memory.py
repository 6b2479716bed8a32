"""What a rank of a training holds in memory, under each stage of ZeRO.

Follows the allocations of DeepSpeed 0.19: `stage_1_and_2.py`, `stage3.py`, and for stage 0 in
bfloat16 `fp16/unfused_optimizer.py`.
"""

from dataclasses import dataclass

from madpo_ray.config import TrainingConfig
from madpo_ray.sizing.footprint import Footprint
from madpo_ray.training.engine import ADAM_BYTES

BYTES = {"float32": 4, "bfloat16": 2}
MOMENTS = ADAM_BYTES
FOUR_BITS = 4.127 / 8  # bytes of a weight in NF4 with double quantisation (Dettmers et al. 2023)
PREFETCHED = 50_000_000  # weights that ZeRO-3 fetches at a time: stage3_prefetch_bucket_size
MASTER = 4  # of a weight that the optimizer keeps in float32, and of its gradient in a step


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of one rank, and in the memory of its host."""

    weights: int  # with those that ZeRO-3 gathers
    optimizer: int  # moments and float32 copies
    gradients: int  # at the end of a step's micro-batches
    carried: int  # gradients that are there when a micro-batch begins, at most
    buckets: int  # in which gradients are reduced
    activations: int  # of a micro-batch, its logits and temporary tensors included
    step: int  # what a step of the optimizer adds, when no activations are there
    host: int = 0  # what is offloaded

    @property
    def peak(self) -> int:
        backward = self.carried + self.activations + self.buckets
        return self.weights + self.optimizer + max(backward, self.gradients + self.step)


def rank_memory(
    footprint: Footprint,
    settings: TrainingConfig,
    *,
    dtype: str,
    num_ranks: int,
    num_micro_batches: int,
) -> RankMemory:
    """Of one of the ranks of a training.

    Args:
        num_micro_batches: of a rank in a step. After the first, gradients are there from before.
    """
    stage = settings.zero_stage
    size = BYTES[dtype]
    trained = footprint.trained
    share = trained // num_ranks

    # Weights: ZeRO-3 shards them, and gathers those that are in use; what it fetches at a time is
    # gathered in one piece, and copied out.
    weights = weight_bytes(footprint, dtype)
    gathered = 0
    if stage == 3:
        weights //= num_ranks
        live = max(settings.stage3_max_live_parameters, footprint.largest)
        live = min(footprint.parameters, live)
        staged = min(live, max(PREFETCHED, footprint.largest))
        gathered = (live + staged) * size

    # Adam's moments, and float32 copies of the weights.
    optimizer = _optimizer_bytes(dtype, stage) * (share if stage else trained)

    # Gradients: sums of the step's micro-batches, and their float32 copy in the step.
    gradients = share * MASTER if stage >= 2 else trained * size
    step = (share if stage else trained) * MASTER
    if stage == 0 and dtype == "float32":
        step = 0
    num_buckets = 2 if settings.overlap_comm and stage in (1, 2) else 1
    buckets = num_buckets * settings.reduce_bucket_size * size if stage else 0

    # What is offloaded.
    host = 0
    if settings.offload_optimizer:
        host = optimizer + gradients + step
        optimizer = gradients = step = 0
    if settings.offload_param:
        host += weights
        weights = 0
    return RankMemory(
        weights=weights + gathered,
        optimizer=optimizer,
        gradients=gradients,
        carried=gradients if num_micro_batches > 1 or stage == 3 else 0,
        buckets=buckets,
        activations=footprint.activations,
        step=step,
        host=host,
    )


def weight_bytes(footprint: Footprint, dtype: str) -> int:
    """Of all weights, before they are sharded; of those in 4 bits one is unpacked at a time."""
    size = BYTES[dtype]
    quantized = footprint.in_four_bits
    unpacked = footprint.largest * size if quantized else 0
    return (footprint.parameters - quantized) * size + round(quantized * FOUR_BITS) + unpacked


def _optimizer_bytes(dtype: str, stage: int) -> int:
    """Of a trained weight. Where it is sharded, float32 weights are copied, too.

    ZeRO-3 means not to, but compares a torch.device with a string (`_create_fp32_partitions`).
    """
    has_copies = dtype == "bfloat16" or stage > 0
    return MOMENTS + (MASTER if has_copies else 0)


def checkpoint_bytes(footprint: Footprint, *, dtype: str, zero_stage: int) -> int:
    """Of one checkpoint, all ranks' parts together: trained weights, their copies and moments.

    ZeRO-3's has no other weights than the float32 copies.
    """
    if zero_stage == 3:
        return footprint.trained * (MASTER + MOMENTS)
    return footprint.trained * (BYTES[dtype] + _optimizer_bytes(dtype, zero_stage))
