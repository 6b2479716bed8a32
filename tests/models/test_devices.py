"""The device of a process."""

import pytest
import torch

from madpo_ray.models.devices import use_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_threads_without_a_gpu() -> None:
    assert use_device() == torch.device("cpu")


@pytest.mark.gpu
def test_gpu_is_set_up_for_changing_shapes() -> None:
    assert use_device().type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
