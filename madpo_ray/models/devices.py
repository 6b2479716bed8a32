"""The device that a process computes on."""

import torch


def use_device() -> torch.device:
    """The GPU that Ray gave to this process, or its CPU; set up for batches of any shape."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # cuDNN makes a plan of its attention for each new shape, in 3 ms of the host's time per layer
    # on an H200, and hardly any two micro-batches have one shape. PyTorch's other kernels serve.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", torch.cuda.current_device())
