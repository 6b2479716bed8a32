"""README's commands are true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from madpo_ray.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
MAKE = [command for command in COMMANDS if command.startswith("make ")]
OF_A_RUN = ("madpo-ray verify runs/my-run", "madpo-ray report runs/my-run")
MADPO = [
    command for command in COMMANDS if command.startswith("madpo-ray ") and command not in OF_A_RUN
]


def test_has_the_main_commands() -> None:
    assert {"make demo", "make test"} <= set(MAKE)
    assert len(MADPO) >= 3


def test_is_short() -> None:
    assert len(README.split()) <= 1100


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command: str) -> None:
    dry = ["make", "-n", *command.split()[1:]]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", MADPO)
def test_commands_run(command: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """As a dry run, with README's own config on the tests' model and pairs."""
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    replacements = {
        "/models/SmolLM2-135M-Instruct": str(model_folder),
        "/data/pairs.jsonl": str(pairs_file),
        "use_gpu: true": "use_gpu: false",
    }
    for old, new in replacements.items():
        assert example.count(old) == 1, old
        example = example.replace(old, new)
    (tmp_path / "my.yaml").write_text(example)

    arguments = command.split()[1:]
    if "--config" in arguments:
        # The tests' model has 256 positions.
        arguments += ["--set", "data.max_length=64"]
    if arguments[0] in ("run", "train", "tune"):
        arguments.append("--dry-run")
    program = Path(sys.executable).with_name("madpo-ray")
    done = subprocess.run(
        [program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.parametrize("command", OF_A_RUN)
def test_commands_about_a_run(command: str, finished_run: tuple[Config, list[str]]) -> None:
    assert command in COMMANDS
    program = Path(sys.executable).with_name("madpo-ray")
    arguments = [program, command.split()[1], str(finished_run[0].run.folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("pairs: intact\n" if "verify" in command else "report: ") in done.stdout


def test_every_command_is_covered() -> None:
    """What needs the network or a running cluster: the submission is tested in test_jobs.py."""
    others = [command for command in COMMANDS if command not in (*MAKE, *MADPO, *OF_A_RUN)]
    assert all(command.startswith(("git clone", "cd ", "ray job submit")) for command in others)


@pytest.mark.parametrize(
    "file",
    ["README.md", "madpo_ray/README.md", "jobs/README.md", "cluster/README.md", "CONTRIBUTING.md"],
)
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / file).parent / target).exists(), target
