"""What sections of a report are made of: tables, charts, and cells."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from madpo_ray.data.messages import from_text

MAX_TEXT = 600  # characters of a cell


@dataclass(frozen=True)
class Table:
    """A table; one without rows is not shown."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]  # numbers, and texts
    title: str = ""
    is_folded: bool = False  # shown when it is opened


@dataclass(frozen=True)
class Section:
    """A section; false if it has nothing to show."""

    title: str
    note: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: Sequence[alt.TopLevelMixin] = ()

    def __bool__(self) -> bool:
        return any(table.rows for table in self.tables) or bool(self.charts)


def content_text(text: str) -> str:
    """A stored text, or its messages with their roles."""
    content = from_text(text)
    if isinstance(content, str):
        return shorten(content)
    return shorten("\n".join(map(_message_text, content)))


def _message_text(message: dict[str, Any]) -> str:
    """A message's role and text, and what else it holds, such as calls of tools."""
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", plain(part))) for part in content)
    parts = [content or "", plain(others) if others else ""]
    return f"{message.get('role')}: {' '.join(filter(None, parts))}"


def shorten(text: str) -> str:
    """A text that is not too long for a cell."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


def cell(value: Any) -> Any:
    """A number as it is, so that it sorts as one, and anything else as a text."""
    if value is None or number_or_none(value) is not None:
        return value
    return shorten(plain(value))


def plain(value: Any) -> str:
    """A text as it is, and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number_or_none(value: Any) -> float | None:
    """The value if it is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def or_dash(value: Any) -> Any:
    """The value, or a dash if there is none."""
    return "-" if value is None else value
