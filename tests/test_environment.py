"""What Ray's processes find in their environment."""

import json
import os

import pytest

from madpo_ray import environment


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": "backend:native"})
    environment.set_for_local_ray()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"
    assert os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (None, {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTORCH_ALLOC_CONF"}),
        ({"metadata": {}}, {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTORCH_ALLOC_CONF"}),
        ({"runtime_env": None}, {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTORCH_ALLOC_CONF"}),
        (
            {"runtime_env": {"env_vars": {"PYTORCH_ALLOC_CONF": "x", "HF_HOME": "y"}}},
            {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"},
        ),
    ],
)
def test_a_job_and_its_driver_set_different_variables(
    job: dict[str, object] | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(environment.JOB_CONFIG, raising=False)
    if job is not None:
        monkeypatch.setenv(environment.JOB_CONFIG, json.dumps(job))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    found = environment.runtime_env()["env_vars"]
    assert set(found) == expected
    assert found.get("PYTORCH_ALLOC_CONF") in (None, "backend:native")
    assert found["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"
