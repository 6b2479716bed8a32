"""The device of a process, and where the weights of models go."""

import pytest
import torch

from madpo_ray.errors import UserError
from madpo_ray.models.devices import (
    is_spread,
    placement,
    refusing_large_batches,
    refusing_large_models,
    use_device,
)
from support.models import make_model


def test_weights_go_straight_to_a_gpu() -> None:
    """Not through a copy of all of them on the host."""
    gpu = torch.device("cuda", 1)
    assert placement(gpu) == {"device_map": {"": gpu}}
    assert placement(gpu, over_gpus=True) == {"device_map": "balanced"}
    assert placement(torch.device("cpu")) == placement(None) == {}


def test_model_that_fills_its_gpu_is_refused() -> None:
    message = r"do not fit its GPUs \(CUDA out of memory\): raise scoring"
    with pytest.raises(UserError, match=message), refusing_large_models():
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")
    with pytest.raises(UserError, match="raise scoring"), refusing_large_models():
        raise ValueError("Some modules are dispatched on the CPU or the disk. Make sure ...")
    with pytest.raises(ValueError, match="another"), refusing_large_models():
        raise ValueError("another")


def test_batch_that_fills_its_gpu_is_refused() -> None:
    message = r"does not fit the memory of a GPU \(CUDA out of memory\): lower some.key, or raise"
    with pytest.raises(UserError, match=message), refusing_large_batches("some.key"):
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")


def test_model_on_one_device_is_not_spread() -> None:
    """As transformers notes where layers are."""
    model = make_model()
    assert not is_spread(model)
    for places, expected in (({"": 0}, False), ({"a": 0, "b": 0}, False), ({"a": 0, "b": 1}, True)):
        model.hf_device_map = places
        assert is_spread(model) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_threads_without_a_gpu() -> None:
    assert use_device() == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_build_of_torch_that_sees_no_gpu_is_refused() -> None:
    """It would compute on one CPU, where a GPU waits."""
    with pytest.raises(UserError, match=r"2 GPUs, and its PyTorch .* sees none: install the CUDA"):
        use_device(2)


@pytest.mark.gpu
def test_gpu_is_set_up_for_changing_shapes() -> None:
    assert use_device().type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
