"""The pipeline through the Python API, with the flags of `madpo-ray run`.

For `ray job submit ... -- python jobs/run_pipeline.py --config my.yaml`, and as an example to start
from.
"""

import argparse
import time

from madpo_ray import pipeline
from madpo_ray.cli import exit_codes, print_preview, say
from madpo_ray.config import load_config

STAGES = {stage.name: stage for stage in pipeline.STAGES}


def main() -> None:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument("--until", choices=list(STAGES), help="only this stage, and what it needs")
    arguments = parser.parse_args()

    # Wrong input exits with 2 and one message, a stopped training with 75 or 143.
    with exit_codes():
        # A config is checked completely when it is loaded.
        config = load_config(arguments.config, arguments.set)

        # The stages that this config asks for: pairs, reward, margins, train, evaluate, and sft if
        # the config has a section for it.
        last = STAGES.get(arguments.until)
        stages = pipeline.wanted_stages(config, last)
        if arguments.dry_run:
            print_preview(config, stages)
            return

        # Each stage reads the results of earlier ones from their folders and writes its own. What
        # is finished already is not done again.
        pipeline.run_all(config, say=say, deadline=config.run.deadline(began), until=last)

        # Results are in one folder per stage.
        for stage in stages:
            say(f"{stage.name}: results in {stage.folder(config)}")


if __name__ == "__main__":
    main()
