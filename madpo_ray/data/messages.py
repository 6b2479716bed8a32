"""What a column of a row holds: a text, or a list of messages, perhaps stored as JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any

from madpo_ray.data.strict_json import parse_json

# Roles of messages in transformers' chat templates.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# Texts that begin like a list or an object and have the keys of a message.
_LOOKS_STORED = re.compile(r"[\s\ufeff]*(\[|\{|\"\[|array\()")
_MESSAGE_KEYS = (
    re.compile(r"""['"](role|from)\\?['"]\s*:""", re.IGNORECASE),
    re.compile(r"""['"](content|value)\\?['"]\s*:""", re.IGNORECASE),
)

SHAREGPT = "from and value, as in ShareGPT, are not read: rename them to role and content"

Message = dict[str, Any]
Content = str | list[Message]


class BadRowError(ValueError):
    """A row that goes to the rejects.

    `kind` is the reason without the row's own values, by which reasons are counted; `detail` has
    the values.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class UnreadColumnError(BadRowError):
    """A column belongs to the prompt and is not read: the config decides, not the row."""


def read_content(row: Mapping[str, Any], name: str) -> Content:
    """The text or the messages of a column.

    Raises:
        BadRowError: there are none, or they are in no form that a chat template reads.
    """
    value = row.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if isinstance(value, str):
        messages = _stored_messages(value)
        if messages is None:
            if _LOOKS_STORED.match(value) and all(key.search(value) for key in _MESSAGE_KEYS):
                raise BadRowError(f"{name} looks like stored messages, but is not JSON of a list")
            return value
        value = messages
    if not isinstance(value, list):
        kind = type(value).__name__
        raise BadRowError(f"{name} is neither text nor a list of messages", kind)
    return [_message(name, message) for message in value]


def from_text(text: str) -> Content:
    """What `as_text` made the text of: messages, or the text itself."""
    messages = _stored_messages(text)
    return text if messages is None else messages


def _stored_messages(text: str) -> list[Any] | None:
    """The list of messages that a JSON string holds; None if the text is only a text."""
    if not text.lstrip().startswith(("[", "{")):
        return None

    try:
        value, repeated = parse_json(text)
    except (ValueError, RecursionError):
        if re.match(r"\[\s*\{\s*'(role|from|content|value)'", text.lstrip()):
            raise BadRowError("messages are stored as Python text, not as JSON") from None
        return None

    if isinstance(value, dict):
        if {"role", "content"} <= value.keys():
            raise BadRowError("a message is stored without its list")
        return None
    if not value or not all(isinstance(message, dict) for message in value):
        return None
    if all("role" in message for message in value):
        if repeated is not None:
            raise BadRowError("a key of a stored message appears twice", repr(repeated))
        return value  # type: ignore[no-any-return]
    if any({"role", "from"} & message.keys() for message in value):
        raise BadRowError(f"stored messages lack a role ({SHAREGPT})")
    return None


def _message(name: str, message: Any) -> Message:
    """A message with all its keys that have a value; what is in a value stays as it is."""
    if not isinstance(message, Mapping):
        raise BadRowError(f"{name} is neither text nor a list of messages", type(message).__name__)
    kept: Message = {key: value for key, value in message.items() if value is not None}

    role = kept.get("role")
    if "from" in kept and role is None:
        raise BadRowError(f"a message of {name} has no role ({SHAREGPT})")
    if not isinstance(role, str):
        raise BadRowError(f"a message of {name} has no role")
    if role not in ROLES:
        raise BadRowError(f"a message of {name} has an unknown role", repr(role))

    content = kept.get("content")
    if content is None:
        if not kept.get("tool_calls"):
            raise BadRowError(f"a message of {name} has neither content nor tool_calls")
    elif not isinstance(content, str):
        kept["content"] = _parts(name, content)
    return kept


def _parts(name: str, content: Any) -> list[dict[str, Any]]:
    """Content as parts of text; parts of another type are refused by name."""
    if not isinstance(content, list):
        kind = type(content).__name__
        raise BadRowError(f"content of a message of {name} is neither text nor parts", kind)
    parts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise BadRowError(f"content of a message of {name} is neither text nor parts")
        kept = {str(key): value for key, value in part.items() if value is not None}
        if kept.get("type") != "text" or not isinstance(kept.get("text"), str):
            kind = str(kept.get("type"))
            raise BadRowError(f"a message of {name} has a part that is not text", kind)
        parts.append(kept)
    return parts


def as_text(value: Content) -> str:
    """How an artifact stores it: a text as it is, messages as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def says_something(value: Content) -> bool:
    """Whether there is more than white space."""
    if isinstance(value, str):
        return bool(value.strip())
    return any(message.get("tool_calls") or _text_of(message).strip() for message in value)


def _text_of(message: Message) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def rest_after(prompt: Content, response: Content) -> Content | None:
    """What follows the prompt in a response; None if the response does not begin with it.

    White space around the prompt does not count. "Hi" is no prompt of "Hinduism": no word may be
    split.
    """
    if isinstance(prompt, list):
        begins = bool(prompt) and response[: len(prompt)] == prompt
        return response[len(prompt) :] if begins else None
    assert isinstance(response, str)
    bare = prompt.strip()
    if not bare or not response.lstrip().startswith(bare):
        return None
    rest = response.lstrip()[len(bare) :]
    if prompt[-1].isspace():  # which separates them already
        return rest.lstrip() if not rest or rest[0].isspace() else None
    splits_a_word = bare[-1].isalnum() and rest[:1].isalnum()
    return None if splits_a_word else rest
