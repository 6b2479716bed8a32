"""Writing models as transformers loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.artifacts.hashes import describe_files
from madpo_ray.config import ModelConfig
from madpo_ray.models import saving
from madpo_ray.models.loading import load_policy
from madpo_ray.models.saving import needs_conversion, save_hashed, save_model, saved_tensors
from support.models import make_model


def test_several_files_load_as_one_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 40_000)
    settings = ModelConfig(model_name_or_path=str(model_folder))
    model = load_policy(model_folder, settings)
    save_model(model, saved_tensors(model), tmp_path)
    assert len(list(tmp_path.glob("model-0000*-of-0000*.safetensors"))) > 2

    again: Any = load_policy(tmp_path, settings)
    pairs = zip(saved_tensors(model), saved_tensors(again), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name
        assert torch.equal(one, other)
    assert again.config.architectures == ["LlamaForCausalLM"]


def test_what_is_saved_is_hashed(tmp_path: Path) -> None:
    """While it is written: the hash is that of the file."""
    state = {"a": torch.randn(30_000), "b": [1, "two", torch.ones(3, dtype=torch.bfloat16)]}
    file = tmp_path / "state.pt"
    assert {"state.pt": save_hashed(state, file)} == describe_files(tmp_path)
    again = torch.load(file, weights_only=True)
    assert torch.equal(again["a"], state["a"])
    assert again["b"][:2] == [1, "two"]
    with pytest.raises(OSError, match="No space left on device"):
        save_hashed(state, Path("/dev/full"))


def test_only_the_writer_writes(model_folder: Path, tmp_path: Path) -> None:
    """The others only iterate: gathering is a collective."""
    model = load_policy(model_folder, ModelConfig(model_name_or_path=str(model_folder)))
    seen = []
    tensors = ((seen.append(name) or name, tensor) for name, tensor in saved_tensors(model))
    save_model(model, tensors, tmp_path / "out", is_writer=False)
    assert len(seen) == len(list(saved_tensors(model)))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("model_type", "expected"), [("llama", False), ("mixtral", True)])
def test_knows_models_with_other_tensors_in_files(model_type: str, expected: bool) -> None:
    """Mixtral's files have a tensor for each expert, and the model one for all."""
    assert needs_conversion(make_model(model_type)) is expected
