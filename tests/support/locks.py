"""Another process that holds the lock of a run."""

import subprocess
import sys
from pathlib import Path

HOLD = """
import sys, time
from pathlib import Path
from madpo_ray.artifacts.lock import locked
with locked(Path(sys.argv[1]), "reward"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold_elsewhere(folder: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process
