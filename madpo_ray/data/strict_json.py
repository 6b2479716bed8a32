"""JSON whose objects have no key twice: Python's parser would keep the last value, silently."""

import json
from typing import Any, NamedTuple


class Parsed(NamedTuple):
    """A value, and a key that some object in it has twice."""

    value: Any
    repeated_key: str | None


def parse_json(text: str) -> Parsed:
    """Parses JSON. Raises ValueError or RecursionError as json.loads does."""
    repeated: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.append(next(key for key in keys if keys.count(key) > 1))
        return values

    value = json.loads(text, object_pairs_hook=as_dict)
    return Parsed(value, repeated[0] if repeated else None)
