"""Everything here needs a GPU; one table at the end says what was seen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

OUTCOMES: list[tuple[str, str, str]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or report.outcome != "passed":
        seconds = f"{report.duration:.0f}"
        OUTCOMES.append((item.nodeid.partition("::")[2], report.outcome, seconds))


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    if not OUTCOMES or not torch.cuda.is_available():
        return
    name = torch.cuda.get_device_name()
    terminalreporter.section(f"{torch.cuda.device_count()} x {name}, PyTorch {torch.__version__}")
    terminalreporter.write_line("| check | outcome | seconds |")
    terminalreporter.write_line("|---|---|---|")
    for row in OUTCOMES:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
