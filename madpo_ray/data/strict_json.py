"""JSON whose objects have no key twice: Python's parser would keep the last value, silently."""

import json
from typing import Any, NamedTuple


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
