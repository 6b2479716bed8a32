"""GPUs by name."""

import pytest

from madpo_ray.errors import UserError
from madpo_ray.sizing.gpus import find_gpu


def test_known_and_unknown_names() -> None:
    assert find_gpu("H100-80G").flops == 989e12
    with pytest.raises(UserError, match="did you mean 'H100-80G'"):
        find_gpu("H100-80")
