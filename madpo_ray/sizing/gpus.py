"""Memory and speed of GPUs, by name."""

import math
from typing import NamedTuple

from madpo_ray.errors import UserError, did_you_mean


class GPU(NamedTuple):
    """One GPU."""

    memory: int  # bytes, as its driver reports them
    flops: float  # dense, in bfloat16 per second, from NVIDIA's data sheets
    float32_flops: float  # per second, without TF32

    def speed(self, dtype: str) -> float:
        return self.float32_flops if dtype == "float32" else self.flops


def _gib(size: float) -> int:
    return round(size * 2**30)


GPUS = {
    "A10G-24G": GPU(_gib(22.0), 70e12, 35e12),
    "L4-24G": GPU(_gib(22.0), 121e12, 30.3e12),
    "L40S-48G": GPU(_gib(44.4), 362e12, 91.6e12),
    "A100-40G": GPU(_gib(39.4), 312e12, 19.5e12),
    "A100-80G": GPU(_gib(79.2), 312e12, 19.5e12),
    "H100-80G": GPU(_gib(79.1), 989e12, 67e12),
    "H200-141G": GPU(_gib(139.8), 989e12, 67e12),
    "B200-180G": GPU(_gib(178.0), 2250e12, 80e12),
}
# The rest is for CUDA's own context, NCCL, and holes between tensors.
USABLE = 0.92


def find_gpu(name: str) -> GPU:
    """Raises UserError if the name is not known."""
    if name not in GPUS:
        raise UserError(f"--gpu: {name} is not known{did_you_mean(name, GPUS)}")
    return GPUS[name]


class Cluster(NamedTuple):
    """The GPUs to plan for."""

    gpu: GPU
    name: str
    gpus_per_node: int
    nodes: int
    utilisation: float  # share of a GPU's peak that is reached

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def limit(self) -> int:
        """Bytes of a GPU that a plan may fill."""
        return math.floor(self.gpu.memory * USABLE)

    def speed(self, dtype: str) -> float:
        """FLOP/s of all GPUs."""
        return self.num_gpus * self.gpu.speed(dtype) * self.utilisation
