"""Helpers for a pass of Ray Data: actor pools, ordered rows, batches that kill their actors."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray.config import ActorPool
from madpo_ray.errors import ExitCode, Stopped, UserError
from madpo_ray.waiting import waiting

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

# Ray takes a second to import, and a dry run does not need it: it is imported inside functions.

# Attempts of one batch. Ray Data starts an actor again, and gives it the same batch, without end.
MAX_ATTEMPTS = 4
# A column: why an actor's models cannot be used. Ray Data would pass on only the text of an
# exception, as a traceback.
REFUSAL = "refusal"


def pool_options(actors: ActorPool) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool of actors."""
    import ray.data

    pool = ray.data.ActorPoolStrategy(min_size=actors.min_size, max_size=actors.max_size)
    options = {"compute": pool, "num_gpus": actors.num_gpus or None}
    # Next to GPUs Ray takes a CPU by itself, and warns of a given number of them.
    if not (actors.num_gpus and actors.num_cpus == 1):
        options["num_cpus"] = actors.num_cpus
    return options


def count_gpus() -> int:
    """How many GPUs Ray gave to this process; one for a share of one. None without Ray."""
    import ray

    if not ray.is_initialized():  # asking would start one
        return 0
    return len(ray.get_runtime_context().get_accelerator_ids()["GPU"])


def ordered_execution() -> "ray.data.ExecutionOptions":
    """Ray Data options under which rows keep their order, whatever finishes first."""
    import ray.data

    return ray.data.ExecutionOptions(preserve_order=True)


def received(dataset: "ray.data.Dataset", what: str) -> "Iterator[pa.Table]":
    """The tables of a Ray dataset, as they come. If none comes for a minute, a notice is logged."""
    count = 0
    with waiting(
        f"no {what} came; the actors may be waiting for a place (`ray status` shows what is free), "
        "loading their models, or working on a long batch",
        progress=lambda: count,
    ):
        for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
            count += 1
            yield table


def refused(rows: "pa.Table", reason: str, *, key: str) -> "pa.Table":
    """What an actor returns for rows if its models cannot be used.

    Args:
        key: the column that identifies a row.
    """
    import pyarrow as pa

    return pa.table({key: rows[key], REFUSAL: [reason] * rows.num_rows})


def find_refusal(table: "pa.Table") -> str | None:
    """Why an actor's models cannot be used, if the table holds a refusal."""
    import pyarrow.compute as pc

    if REFUSAL not in table.column_names:
        return None
    reason: str = pc.drop_null(table[REFUSAL])[0].as_py()
    return reason


def require_no_refusal(table: "pa.Table") -> None:
    """Raises UserError if an actor put a refusal into the table."""
    if (reason := find_refusal(table)) is not None:
        raise UserError(reason)


class BatchNotes:
    """Which batch each actor works on, in files: one that kills its actors ends the pass.

    Args:
        folder: one that every node mounts. It exists during the pass only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def working_on(self, batch: str) -> Iterator[None]:
        """For an actor, around its work on a batch. A note that stays counts as a death.

        Raises:
            RuntimeError: the batch has killed MAX_ATTEMPTS actors.
        """
        note = self._folder / hashlib.sha256(batch.encode()).hexdigest()
        attempts = len(_lines(note))
        if attempts >= MAX_ATTEMPTS:
            raise RuntimeError(f"{batch} killed {attempts} actors")
        with note.open("a") as stream:
            stream.write(batch + "\n")
        yield
        note.unlink(missing_ok=True)  # an equal batch may have been done at the same time

    @contextlib.contextmanager
    def reporting_deaths(self) -> Iterator[None]:
        """For the driver, around a pass.

        Raises:
            Stopped: a batch killed its actors; names it.
        """
        shutil.rmtree(self._folder, ignore_errors=True)  # of a pass that was killed
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except Exception as error:
            attempts = [_lines(note) for note in self._folder.iterdir()]
            deadly = [lines[0] for lines in attempts if len(lines) >= MAX_ATTEMPTS]
            if not deadly:
                raise
            raise Stopped(
                f"{'; '.join(deadly)}: {MAX_ATTEMPTS} actors died there, as they do if memory runs "
                "out (lower the batch size) or a library crashes",
                ExitCode.FAILED,
            ) from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # other actors may still write


def _lines(note: Path) -> list[str]:
    try:
        return note.read_text().splitlines()
    except FileNotFoundError:  # another actor has just finished the batch
        return []


def write_rows(dataset: "ray.data.Dataset", rows: Path) -> None:
    """Writes a Ray dataset to a fresh folder, in its order."""
    from ray.data import SaveMode
    from ray.data.datasource import FilenameProvider

    class OrderedNames(FilenameProvider):  # type: ignore[misc]
        """File names that follow the order of the rows, without a random part."""

        def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
            return f"part-{task_index:06}.parquet"

    # Ray's append mode demands a random part in each name; there is nothing to overwrite.
    names = OrderedNames(file_format="parquet")
    dataset.write_parquet(str(rows), filename_provider=names, mode=SaveMode.OVERWRITE)
