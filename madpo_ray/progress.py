"""Progress of long stages on a terminal; silent where there is none."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from madpo_ray.metrics import read_metrics

POLL_S = 0.5


@contextlib.contextmanager
def training_progress(what: str, metrics: Path, total_steps: int) -> Iterator[None]:
    """A bar that follows the metrics file a training writes, while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task, done = progress.add_task(what, total=total_steps, loss=""), threading.Event()
        watcher = threading.Thread(target=_follow, args=(progress, task, metrics, done), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _follow(progress: Progress, task: Any, metrics: Path, done: threading.Event) -> None:
    while not done.wait(POLL_S):
        whole = read_metrics(metrics)
        if whole:
            loss = next((f"loss {line['loss']:.4f}" for line in reversed(whole) if "loss" in line), "")
            progress.update(task, completed=whole[-1]["step"], loss=loss)
