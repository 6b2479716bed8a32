"""A progress bar on a terminal; none if the output is redirected."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from madpo_ray.training.metrics import last_with, read_metrics

POLL_S = 0.5


@contextlib.contextmanager
def training_bar(stage: str, metrics: Path, total_steps: int) -> Iterator[None]:
    """Follows the metrics file that a training writes, during the block."""
    if not sys.stderr.isatty():
        yield
        return
    bar = Progress(
        TextColumn(stage),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    # A thread follows the file until the block ends.
    with bar:
        task = bar.add_task(stage, total=total_steps, loss="")
        done = threading.Event()
        watcher = threading.Thread(target=_follow, args=(bar, task, metrics, done), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join(timeout=1.0)  # it may hang in a file system that does not answer


def _follow(bar: Progress, task: TaskID, metrics: Path, done: threading.Event) -> None:
    while not done.wait(POLL_S):
        lines = read_metrics(metrics)
        if not lines:
            continue
        newest = last_with(lines, "loss")
        loss = f"loss {newest['loss']:.4f}" if newest else ""
        bar.update(task, completed=lines[-1]["step"], loss=loss)
