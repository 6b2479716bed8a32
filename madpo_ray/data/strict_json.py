"""JSON whose objects have no key twice: Python's parser would keep the last value, silently.

Also arrays that are read element by element.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from madpo_ray.data import files
from madpo_ray.data.files import DAMAGED, READ_BYTES, Row


class Parsed(NamedTuple):
    """A value, and a key that some object in it has twice."""

    value: Any
    repeated_key: str | None


def parse_json(text: str) -> Parsed:
    """Parses JSON. Raises ValueError or RecursionError as json.loads does."""
    objects = _Objects()
    value = json.loads(text, object_pairs_hook=objects.as_dict)
    return Parsed(value, objects.repeated_key)


def parse_json_at(text: str, start: int) -> tuple[Parsed, int]:
    """Parses one value that begins at a place in a text; also gives where it ends."""
    objects = _Objects()
    decoder = json.JSONDecoder(object_pairs_hook=objects.as_dict)
    value, end = decoder.raw_decode(text, start)
    return Parsed(value, objects.repeated_key), end


class _Objects:
    """Makes dicts of objects, and remembers the first key that one has twice."""

    def __init__(self) -> None:
        self.repeated_key: str | None = None

    def as_dict(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and self.repeated_key is None:
            keys = [key for key, _ in pairs]
            self.repeated_key = next(key for key in keys if keys.count(key) > 1)
        return values


class ArrayParser:
    """The elements of a JSON array, of which one at a time is in memory."""

    _space = re.compile(r"[ \t\r\n]*")

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._start = 0
        self._is_at_end = False

    def elements(self) -> Iterator[Row | str]:
        """Objects, or reasons. Ends at the first place that is no JSON."""
        self._expect("[")
        is_open = not self._expect("]")
        while is_open:
            try:
                row, repeated = self._element()
            except (ValueError, RecursionError) as error:
                yield f"{DAMAGED}: {error}"
                return
            if repeated is not None:
                yield f"a key appears twice: {repeated!r}"
            else:
                yield row if isinstance(row, dict) else "element is not a JSON object"
            is_open = not self._expect("]")
            if is_open and not self._expect(","):
                yield f"{DAMAGED}: {self._next()!r} after an element"
                return
        if rest := self._next():
            yield f"{DAMAGED}: {rest!r} after the array; is it several files in one?"

    def _element(self) -> tuple[object, str | None]:
        self._next()
        while True:
            try:
                parsed, end = parse_json_at(self._text, self._start)
            except (ValueError, RecursionError):
                is_too_long = len(self._text) - self._start > files.MAX_LINE_BYTES
                if self._is_at_end or is_too_long or not self._read():
                    raise
                continue
            # A number at the end of what was read may go on.
            if end < len(self._text) or not self._read():
                self._start = end
                return parsed

    def _next(self) -> str:
        """The next character that is no space, not taken; empty at the end."""
        while True:
            space = self._space.match(self._text, self._start)
            assert space is not None
            self._start = space.end()
            if self._start < len(self._text) or not self._read():
                return self._text[self._start : self._start + 1]

    def _expect(self, character: str) -> bool:
        is_next = self._next() == character
        self._start += is_next
        return is_next

    def _read(self) -> bool:
        """Reads as much again as there is, so that a long element is parsed few times."""
        self._text = self._text[self._start :]
        self._start = 0
        block = self._stream.read(max(READ_BYTES, len(self._text)))
        self._is_at_end = not block
        self._text += self._decoder.decode(block, final=self._is_at_end)
        return not self._is_at_end
