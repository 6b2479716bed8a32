"""The KubeRay resource below cluster/."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "tests" / "schemas" / "kuberay-1.7.0-rayjobs-v1.schema.json"


@pytest.fixture
def rayjob() -> Any:
    return yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())


@pytest.fixture
def validator() -> Any:
    return jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))


def test_rayjob_is_valid(rayjob: Any, validator: Any) -> None:
    assert list(validator.iter_errors(rayjob)) == []


def test_schema_rejects_a_misspelt_key(rayjob: Any, validator: Any) -> None:
    rayjob["spec"]["entrypont"] = rayjob["spec"].pop("entrypoint")
    assert list(validator.iter_errors(rayjob))


def test_rayjob_passes_the_controllers_checks(rayjob: Any) -> None:
    """What the schema does not say."""
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    yaml.safe_load(spec["runtimeEnvYAML"])
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert (ROOT / spec["entrypoint"].split()[1]).is_file()
