"""What README and the map say about the structure is true."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "madpo_ray"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

HEAVY = ("torch", "ray", "deepspeed", "transformers")
# Modules without a test file of their own, and where they are tested.
TESTED_ELSEWHERE = {
    "columns": "names only",
    "config/base": "config/test_sections.py",
    "config/inputs": "config/test_sections.py",
    "config/training": "config/test_sections.py",
    "config/reward": "config/test_sections.py",
    "config/evaluation": "config/test_sections.py",
    "config/root": "config/test_sections.py",
    "config/search": "config/test_sections.py and search/test_space.py",
    "models/conversion": "models/test_source.py",
    "models/preparing": "models/test_loading.py",
    "search/progress": "stages/test_tune.py, on a real Ray",
    "search/records": "stages/test_tune.py, on a real Ray",
    "search/trials": "stages/test_tune.py, on a real Ray",
    "search/tuner": "stages/test_tune.py, on a real Ray",
    "report/parts": "report/test_sections.py and report/test_page.py",
    "report/results": "report/test_sections.py",
    "data/messages": "data/test_formats.py",
    "models/trainable": "models/test_loading.py",
    "data/strict_json": "data/test_sources.py and data/test_formats.py",
    "scoring/actors": "stages/test_margins.py, on a real Ray",
    "evaluation/sampling": "stages/test_evaluate.py, on a real Ray",
    "stages/policy_samples": "stages/test_evaluate.py",
    "stages/judge_source": "stages/test_evaluate.py and stages/test_reward_source.py",
    "evaluation/sample_sets": "names only",
    "config/paths": "config/test_files.py",
    "sizing/trainings": "sizing/test_plan.py",
    "sizing/passes": "sizing/test_plan.py",
    "sizing/peak": "sizing/test_footprint.py",
    "stages/sft": "training/test_tasks.py and stages/test_stage.py",
    "stages/reward": "stages/test_margins.py",
    "training/bar": "needs a terminal",
    "training/job": "training/test_tasks.py",
    "training/protocols": "interfaces only",
    "training/rank": "training/test_resume.py and the other tests on real ranks",
    "training/sites": "every test on real ranks",
}


def name_of(module: Path) -> str:
    return str(module.relative_to(PACKAGE).with_suffix(""))


def imported_by(modules: Sequence[str]) -> dict[str, list[str]]:
    """The heavy packages that are loaded after each import, in one fresh interpreter."""
    code = f"""
import importlib, json, sys
loaded = {{}}
for module in {list(modules)}:
    importlib.import_module(module)
    loaded[module] = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


LIGHT = (
    "madpo_ray.config",
    "madpo_ray.errors",
    "madpo_ray.columns",
    "madpo_ray.signals",
    "madpo_ray.pipeline",
    "madpo_ray.cli",
)
WITHOUT_RAY = (
    "madpo_ray.data.order",
    "madpo_ray.data.batching",
    "madpo_ray.data.reader",
    "madpo_ray.models.source",
    "madpo_ray.models.loading",
    "madpo_ray.models.logprobs",
    "madpo_ray.models.saving",
    "madpo_ray.models.flops",
    "madpo_ray.losses",
    "madpo_ray.scoring.scorers",
    "madpo_ray.training.loop",
    "madpo_ray.training.rank",
    "madpo_ray.training.engine",
    "madpo_ray.training.objectives",
)


def test_light_modules_load_nothing_heavy() -> None:
    """So that `--help` and a wrong config take less than a second."""
    assert imported_by(LIGHT) == {module: [] for module in LIGHT}


def test_core_loads_no_ray() -> None:
    """Formulas, order, batching, models and the loop run without it."""
    loaded = imported_by(WITHOUT_RAY)
    assert [module for module, heavy in loaded.items() if "ray" in heavy] == []


def test_reader_of_micro_batches_imports_no_torch() -> None:
    """Its Ray Data actor starts faster without it."""
    modules = ["madpo_ray.data.order", "madpo_ray.data.micro_batches"]
    assert imported_by(modules) == {module: [] for module in modules}


def test_loop_names_no_metric_of_a_loss() -> None:
    """They belong to the table of losses; which modules it imports, the linter knows."""
    for name in ("loop", "protocols", "schedule", "metrics"):
        assert "weight/" not in (PACKAGE / "training" / f"{name}.py").read_text()


@pytest.mark.parametrize("folder", [PACKAGE, *(p for p in PACKAGE.iterdir() if p.is_dir())])
def test_folders_are_small(folder: Path) -> None:
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 16


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_modules_and_functions_are_short(module: Path) -> None:
    source = module.read_text()
    assert source.count("\n") <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_has_a_test(module: Path) -> None:
    folder = ROOT / "tests" / module.relative_to(PACKAGE).parent
    has_test = (folder / f"test_{module.name}").exists()
    assert has_test != (name_of(module) in TESTED_ELSEWHERE)


def test_list_of_exceptions_is_current() -> None:
    assert TESTED_ELSEWHERE.keys() <= {name_of(module) for module in MODULES}


def test_map_names_every_module() -> None:
    """The map in madpo_ray/README.md."""
    text = (PACKAGE / "README.md").read_text()
    block = text.split("```")[1]
    named = set()
    folder = ""
    for line in block.splitlines():
        if match := re.match(r"^(\w+)/", line):
            folder = match.group(1) + "/"
        elif match := re.match(r"^(  )?(\w+)\.py ", line):
            named.add((folder if match.group(1) else "") + match.group(2))
    assert named == {name_of(module) for module in MODULES}
