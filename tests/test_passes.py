"""Passes of Ray Data: their limits, and what they say."""

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from madpo_ray.cluster.connection import connected
from madpo_ray.config import ActorPool, ClusterConfig
from madpo_ray.errors import ExitCode, Stopped
from madpo_ray.passes import BatchNotes, pool_options, received

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


class Deadly:
    """Ends its process, as running out of memory does, whenever it sees a certain row."""

    def __init__(self, notes: BatchNotes, victim: int) -> None:
        self._notes = notes
        self._victim = victim

    def __call__(self, rows: pa.Table) -> pa.Table:
        numbers = rows["id"].to_pylist()
        with self._notes.working_on(f"row {numbers}"):
            if self._victim in numbers:
                os.kill(os.getpid(), signal.SIGKILL)
        return rows


def run(notes: BatchNotes, victim: int) -> list[pa.Table]:
    import ray.data

    dataset = ray.data.range(4, override_num_blocks=4).map_batches(
        Deadly,
        fn_constructor_kwargs={"notes": notes, "victim": victim},
        batch_size=1,
        batch_format="pyarrow",
        **pool_options(ActorPool(1, 1, 1.0, 0.0)),
    )
    with notes.reporting_deaths():
        return list(received(dataset, "rows"))


def test_actors_have_what_the_config_says() -> None:
    options = pool_options(ActorPool(2, 5, 1.5, 0.25))
    assert (options["num_cpus"], options["num_gpus"]) == (1.5, 0.25)
    assert (options["compute"].min_size, options["compute"].max_size) == (2, 5)
    # Of one CPU next to a GPU Ray warns: it takes one itself.
    assert pool_options(ActorPool(1, 1, 1.0, 2.0)).keys() == {"compute", "num_gpus"}
    assert pool_options(ActorPool(1, 1, 1.0, 0.0))["num_gpus"] is None


def test_batch_that_kills_its_actor_is_named(tmp_path: Path) -> None:
    """After four deaths, not after infinitely many."""
    with connected(ClusterConfig()), pytest.raises(Stopped) as caught:
        run(BatchNotes(tmp_path / "notes"), victim=2)
    assert caught.value.exit_code is ExitCode.FAILED
    assert caught.value.message.startswith("row [2]: 4 actors died there")
    assert not (tmp_path / "notes").exists()


def test_notes_leave_nothing(tmp_path: Path) -> None:
    with connected(ClusterConfig()):
        tables = run(BatchNotes(tmp_path / "notes"), victim=-1)
    assert sum(table.num_rows for table in tables) == 4
    assert list(tmp_path.iterdir()) == []


def test_actors_without_a_place_are_an_error() -> None:
    """A pool larger than the cluster, which autoscaling lets pass, ends after its time-out."""
    import ray.data

    cluster: Any = ClusterConfig(num_workers=1, cpus_per_worker=99, autoscaling=True)
    cluster = cluster.model_copy(update={"placement_timeout_s": 2.0})

    def wait() -> None:
        with connected(cluster):
            dataset = ray.data.range(4).map_batches(
                Deadly,
                fn_constructor_kwargs={"notes": BatchNotes(Path("/nowhere")), "victim": -1},
                batch_format="pyarrow",
                **pool_options(ActorPool(1, 1, 99.0, 0.0)),
            )
            list(received(dataset, "rows"))

    with pytest.raises(Stopped, match=r"cluster\.placement_timeout_s: 2 seconds"):
        wait()
    with connected(ClusterConfig()):
        pass  # sets Ray Data's options back
