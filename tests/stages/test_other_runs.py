"""Other runs that a run is compared with."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from madpo_ray.artifacts.tables import rows_folder, write_table
from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.stages.other_runs import require_unseen_pairs


def test_run_that_has_seen_the_test_pairs_is_refused(config: Config, tmp_path: Path) -> None:
    """Splits follow the seed: nine tenths of one seed's test pairs are another's training pairs."""
    for run, splits in (("this", ["test", "train"]), ("other", ["train", "test"])):
        folder = tmp_path / run / "pairs"
        table = pa.table({"split": splits, "group_hash": [1, 2]})
        write_table(table, rows_folder(folder))
        files = {"data/part-000000.parquet": {}}
        manifest = {"inputs": {}, "results": {}, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    raw = config.model_dump(mode="json")
    raw["run"] |= {"name": "this", "storage_path": str(tmp_path)}
    raw["evaluate"]["compare_with"] = [str(tmp_path / "this")]
    require_unseen_pairs(parse_config(raw))
    raw["evaluate"]["compare_with"] = [str(tmp_path / "other")]
    with pytest.raises(UserError, match=r"other was trained on 1 of the 1 pairs .* run\.seed"):
        require_unseen_pairs(parse_config(raw))
