"""Preference pairs in TRL's formats: a row becomes prompt, chosen and rejected, or has a reason.

Standard (strings), conversational (lists of messages), and both with an implicit prompt (no column
`prompt`: the common beginning of chosen and rejected).
"""

from collections.abc import Mapping
from typing import Any

from madpo_ray import columns
from madpo_ray.data.sources import Row

Message = dict[str, str]


class BadRowError(ValueError):
    """A row that goes to the rejects, with this reason."""


def parse_pair(row: Mapping[str, Any]) -> Row:
    """`prompt`, `chosen`, `rejected` of a row: all strings, or all lists of messages.

    Raises:
        BadRowError: a value is missing, empty, or neither text nor messages, or chosen and rejected
            are identical.
    """
    chosen = _value(row, columns.CHOSEN)
    rejected = _value(row, columns.REJECTED)
    if type(chosen) is not type(rejected):
        raise BadRowError("chosen and rejected are of different kinds")

    if columns.PROMPT in row:
        prompt = _value(row, columns.PROMPT)
    else:
        prompt, chosen, rejected = _split_implicit_prompt(chosen, rejected)
    if type(prompt) is not type(chosen):
        raise BadRowError("prompt and chosen are of different kinds")

    pair = {columns.PROMPT: prompt, columns.CHOSEN: chosen, columns.REJECTED: rejected}
    for name, value in pair.items():
        if not _text(value).strip():
            raise BadRowError(f"{name} is empty")
    if chosen == rejected:
        raise BadRowError("chosen and rejected are identical")
    return pair


def _value(row: Mapping[str, Any], name: str) -> str | list[Message]:
    value = row.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(_is_message(message) for message in value):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    kind = type(value).__name__
    raise BadRowError(
        f"{name} is neither text nor a list of messages with role and content ({kind})"
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _text(value: str | list[Message]) -> str:
    if isinstance(value, str):
        return value
    return "".join(message["content"] for message in value)


def _split_implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The common beginning is the prompt, as in TRL's `extract_prompt`.

    A text's prompt does not include the last space before the difference.
    """
    length = min(len(chosen), len(rejected))
    shared = next((i for i in range(length) if chosen[i] != rejected[i]), length)
    if isinstance(chosen, str) and shared > 0 and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]
