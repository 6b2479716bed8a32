"""The demo: DPO and MADPO on the same pairs, compared by a judge that has seen none of them.

Both runs have the same pairs, reward model and margins: they are computed once, and copied. It uses
the Python API, as `run_pipeline.py` does.
"""

import argparse
import shutil
from pathlib import Path

from madpo_ray import pipeline
from madpo_ray.cli import exit_codes, say
from madpo_ray.cluster.connection import connected
from madpo_ray.config import Config, load_config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    arguments = parser.parse_args()
    file = arguments.config
    with exit_codes():
        madpo = load_config(file, arguments.set)
        dpo = dpo_config(file, arguments.set)
        pipeline.check(dpo, pipeline.wanted_stages(dpo))  # the judge, too, which comes last
        if not train.STAGE.is_finished(dpo) or pipeline.pending(madpo):
            with connected(madpo.cluster, actors=madpo.actors):
                run_both(madpo, dpo)
        pipeline.report([madpo.run.folder, dpo.run.folder], say=say)


def dpo_config(file: Path, overrides: list[str]) -> Config:
    """The run that MADPO is compared with: the same in everything but the loss."""
    others = load_config(file, overrides).evaluate.compare_with
    if len(others) != 1:
        raise UserError(f"evaluate.compare_with: the demo compares with one run, not {len(others)}")
    changes = ["train.loss_type=sigmoid", "evaluate.compare_with=[]"]
    dpo = load_config(file, [*overrides, *changes, f"run.name={Path(others[0]).name}"])
    if dpo.run.folder != Path(others[0]):
        raise UserError(
            f"evaluate.compare_with: DPO is trained next to this run: give {dpo.run.folder}"
        )
    return dpo


def run_both(madpo: Config, dpo: Config) -> None:
    pipeline.run_all(madpo, say=say, until=margins.STAGE)
    if not train.STAGE.is_finished(dpo):
        copy_run(madpo.run.folder, dpo.run.folder)
        say("\nDPO on these pairs, where every pair counts the same")
        pipeline.run_all(dpo, say=say, until=train.STAGE)
    say("\nMADPO on these pairs, each with its weight")
    pipeline.run_all(madpo, say=say)


def copy_run(source: Path, target: Path) -> None:
    """Copies a run's finished stages up to margins, unless the target holds any; all or nothing."""
    if target.exists() and any(target.iterdir()):
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    others = shutil.ignore_patterns("ray", "train", "evaluate", ".*", "*.html")
    shutil.copytree(source, partial, ignore=others)
    partial.rename(target)


if __name__ == "__main__":
    main()
