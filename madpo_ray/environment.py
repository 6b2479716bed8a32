"""Environment variables of Ray's processes."""

import json
import os

# Workers without a GPU of their own see none: PyTorch and DeepSpeed would take the first. And on a
# GPU, freed pieces of memory can be joined for a larger micro-batch.
FOR_WORKERS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
FOR_LOCAL_DRIVER = {
    # Parquet footers are read by up to 32 one-CPU actors, which would starve a small machine.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}
# Where `ray job submit` puts the config of the job.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def set_for_local_ray() -> None:
    """Sets what the processes of a Ray that this one starts inherit, unless it is set."""
    for name, value in {**FOR_WORKERS, **FOR_LOCAL_DRIVER}.items():
        os.environ.setdefault(name, value)


def runtime_env() -> dict[str, dict[str, str]]:
    """Ray's `runtime_env` for the workers of a cluster: this process's values, or the usual ones.

    Without what a submitted job has set: Ray refuses what both the job and its driver set.
    """
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    taken = (job.get("runtime_env") or {}).get("env_vars") or {}
    chosen = {name: os.environ.get(name, usual) for name, usual in FOR_WORKERS.items()}
    return {"env_vars": {name: value for name, value in chosen.items() if name not in taken}}
