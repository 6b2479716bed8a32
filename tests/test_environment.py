"""What Ray's processes find in their environment."""

import json
import os
import subprocess
import sys

import pytest

from madpo_ray import environment

# With logical GPUs: what Ray tells a process to see, and what it says that the process was given.
ON_A_NODE_WITH_GPUS = """
import os, ray
from madpo_ray.environment import set_for_local_ray
from madpo_ray.passes import count_gpus

set_for_local_ray()
ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)

@ray.remote
class Actor:
    def see(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES"), count_gpus()

for share in (0, 0.5, 1, 2):
    actor = Actor.options(num_gpus=share).remote()
    print(share, *ray.get(actor.see.remote()))
    ray.kill(actor)
"""


@pytest.mark.ray
def test_actor_without_a_gpu_sees_none() -> None:
    """PyTorch and DeepSpeed would take the first, which is another's."""
    environ = {name: os.environ[name] for name in os.environ if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", ON_A_NODE_WITH_GPUS]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    seen = [line.split(" ") for line in done.stdout.splitlines()]
    assert seen[0] == ["0", "", "0"]
    assert [[share, count] for share, _, count in seen[1:]] == [
        ["0.5", "1"],
        ["1", "1"],
        ["2", "2"],
    ]
    assert [len(visible.split(",")) for _, visible, _ in seen[1:]] == [1, 1, 2]


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": "backend:native"})
    environment.set_for_local_ray()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"
    assert os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (None, ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTORCH_ALLOC_CONF"]),
        ({"metadata": {}}, ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTORCH_ALLOC_CONF"]),
        ({"runtime_env": None}, ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTORCH_ALLOC_CONF"]),
        (
            {"runtime_env": {"env_vars": {"PYTORCH_ALLOC_CONF": "x", "HF_HOME": "y"}}},
            ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"],
        ),
    ],
)
def test_a_job_and_its_driver_set_different_variables(
    job: dict[str, object] | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(environment.JOB_CONFIG, raising=False)
    if job is not None:
        monkeypatch.setenv(environment.JOB_CONFIG, json.dumps(job))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    values = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", "PYTORCH_ALLOC_CONF": "backend:native"}
    found = environment.runtime_env()["env_vars"]
    assert found == {name: values[name] for name in expected}
