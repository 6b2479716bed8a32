"""What a source of pairs yields, and how much of a file is in memory at a time."""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

ROWS_PER_BATCH = 1024
# A line, or an object of a JSON array, without an end is not read into memory completely.
MAX_LINE_BYTES = 64 * 2**20

# The kind of reason after which a file has no more rows.
DAMAGED = "the rest of the file cannot be read"

Row = dict[str, Any]


class Source(Protocol):
    """One file of rows. Nothing is read before a method is called.

    Attributes:
        suffixes: how the names of such files end.
        has_types: whether a number is a number; otherwise every value is text.
    """

    suffixes: ClassVar[tuple[str, ...]]
    has_types: ClassVar[bool]

    def columns(self) -> list[str] | None:
        """The file's columns, or None if it has no readable row. Raises UserError."""

    def rows(self) -> Iterator[Row | str]:
        """The rows in order.

        Instead of a row that cannot be read, the reason: what it is, and after ": " its values.
        """

    def count(self) -> int:
        """An upper bound of the number of rows, without reading their values."""
