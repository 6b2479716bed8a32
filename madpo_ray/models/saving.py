"""Write a model as a folder that transformers loads."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from madpo_ray.artifacts.hashes import FileEntry, HashingWriter
from madpo_ray.atomic import write_json

# Same shard size as transformers' default.
SHARD_BYTES = 5 * 10**9

NamedTensors = Iterable[tuple[str, Tensor]]


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once (tied ones share it), and every buffer that belongs in a file."""
    persistent = model.state_dict(keep_vars=True).keys()
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


def save_hashed(state: Mapping[str, Any], path: Path) -> FileEntry:
    """`torch.save` into a new file, and the hash of what was written: nothing is read back."""
    writer = HashingWriter(path)
    try:
        torch.save(state, writer)  # type: ignore[arg-type]
    finally:
        entry = writer.close()
    return entry


def merge_adapter(model: Any, adapter: dict[str, Tensor], base: nn.Module) -> nn.Module:
    """`base`, a complete model, with the trained LoRA part of `model` merged into its weights."""
    from peft import PeftModel  # takes seconds to import

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=adapter)
        merged: nn.Module = PeftModel.from_pretrained(base, folder).merge_and_unload()
    return merged


def needs_conversion(model: Any) -> bool:
    """Whether transformers renames, merges or splits the model's tensors in its files.

    Asked with empty tensors: under ZeRO-3 transformers notes every conversion that there might have
    been.
    """
    from transformers.core_model_loading import revert_weight_conversion

    empty = {}
    for name, tensor in saved_tensors(model):
        shape = getattr(tensor, "ds_shape", tensor.shape)
        empty[name] = torch.empty(shape, device="meta")
    saved = revert_weight_conversion(model, dict(empty))
    if saved.keys() != empty.keys():
        return True
    return any(saved[name] is not tensor for name, tensor in empty.items())


def save_model(model: Any, tensors: NamedTensors, folder: Path, *, is_writer: bool = True) -> None:
    """Writes weights and config as transformers loads them.

    Every rank iterates over `tensors`, which may gather them; only the writer writes. One file's
    worth of tensors is in memory at a time, unless the files hold other tensors than the model.
    """
    if needs_conversion(model) or model.is_remote_code():
        complete = {name: tensor for name, tensor in tensors if is_writer}
        if is_writer:
            model.save_pretrained(str(folder), state_dict=complete)
        return

    # One file's worth of tensors at a time.
    folder.mkdir(parents=True, exist_ok=True)
    shards = _ShardWriter(folder)
    for name, tensor in tensors:
        if is_writer:
            shards.add(name, tensor)
    if not is_writer:
        return
    shards.finish()

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


class _ShardWriter:
    """Safetensors files of at most SHARD_BYTES, and their index if there are several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._files: list[list[str]] = []  # names of the tensors in each file

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes what is held, and gives all files their final names."""
        self._flush()
        count = len(self._files)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        else:
            weight_map = {}
            for file_name, keys in zip(names, self._files, strict=True):
                weight_map.update(dict.fromkeys(keys, file_name))
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self._folder / "model.safetensors.index.json", index)
        for i, file_name in enumerate(names):
            self._part(i).rename(self._folder / file_name)

    def _flush(self) -> None:
        save_file(self._held, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held.clear()
        self._held_bytes = 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"
