"""README's commands and file map are true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_there_are_commands() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("madpo-ray ")])
def test_commands_run(command: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    text = example.replace("/models/SmolLM2-135M-Instruct", str(model_folder)).replace(
        "/data/pairs.jsonl", str(pairs_file)
    )
    text = text.replace("use_gpu: true", "use_gpu: false")
    assert text.count(str(tmp_path.parent)) or text != example
    (tmp_path / "my.yaml").write_text(text)
    arguments = command.split()[1:]
    if "--help" not in arguments and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    program = Path(sys.executable).with_name("madpo-ray")
    done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_is_covered() -> None:
    others = [command for command in COMMANDS if not command.startswith(("make ", "madpo-ray "))]
    # What needs the network or a running cluster: the job's submission is tested in test_jobs.py.
    assert all(command.startswith(("git clone", "cd ", "ray job submit")) for command in others), others


def test_the_file_map_is_true() -> None:
    named = set(re.findall(r"^    (\w+\.py) ", README, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "madpo_ray").glob("*.py")} - {"__init__.py"}
