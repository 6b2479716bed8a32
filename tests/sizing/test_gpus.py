"""GPUs by name."""

import pytest

from madpo_ray.errors import UserError
from madpo_ray.sizing.gpus import find_gpu


def test_known_and_unknown_names() -> None:
    gpu = find_gpu("H100-80G")
    assert (gpu.speed("bfloat16"), gpu.speed("float32")) == (989e12, 67e12)
    with pytest.raises(UserError, match="did you mean 'H100-80G'"):
        find_gpu("H100-80")
