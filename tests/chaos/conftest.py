"""The table of faults, printed at the end of the tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.faults import Record

ROWS: list[tuple[str, str, int, str]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def record() -> Record:
    """Adds a row to the table: where, which fault, how many of it, and how each ended."""

    def add(place: str, fault: str, count: int, outcome: str) -> None:
        ROWS.append((place, fault, count, outcome))

    return add


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    if not ROWS:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| where | fault | faults | each time after it |")
    terminalreporter.write_line("|---|---|---|---|")
    for place, fault, count, outcome in ROWS:
        terminalreporter.write_line(f"| {place} | {fault} | {count} | {outcome} |")
    total = sum(count for _, _, count, _ in ROWS)
    terminalreporter.write_line(f"| all | | {total} | |")
