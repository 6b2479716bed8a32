"""The most memory that a forward and backward hold at a time, counted on PyTorch's fake tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from madpo_ray.data.batching import MicroBatch


def peak_bytes(module: Any, batch: MicroBatch) -> int:
    """The peak of a forward and backward (a forward, if nothing is trained), without the weights.

    Gradients of weights are freed one by one, as under ZeRO-2 and 3.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module.to_empty(device="cpu")
        batch = batch.map_tensors(fake.from_tensor)
        trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
        tracker = PeakMemory([*module.parameters(), *module.buffers()])
        with tracker, torch.set_grad_enabled(bool(trained)):
            outputs = module(batch)
            if trained:
                next(iter(outputs.values())).sum().backward()
    return tracker.peak


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes at a time, in the block, of tensors that were made there.

    PyTorch's own `MemTracker` cannot read a model with frozen weights.

    Args:
        known: tensors that do not count, and neither do views of them.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size


def drop_gradient(parameter: Tensor) -> None:
    """A hook for a gradient that is complete: it goes into a bucket, and its memory is free."""
    parameter.grad = None
