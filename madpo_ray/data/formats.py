"""A row becomes a pair: prompt, chosen and rejected, as texts or as lists of messages.

The layouts that are read, with the columns' names from the config:

- texts: `prompt`, `chosen`, `rejected` (TRL's standard format);
- messages: all three as lists of messages (TRL's conversational format);
- a text as `prompt`, messages as `chosen` and `rejected`: the prompt is the first user message;
- messages that begin with the prompt, or share their first turns and have no `prompt` column;
- texts that begin with the prompt; or, only if `data.implicit_prompt` is set, texts without a
  `prompt` column, whose common beginning is the prompt.

A list of messages may be stored as a JSON string. Everything else is refused with a reason: nothing
is guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from madpo_ray.config import DataConfig

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


@dataclass(frozen=True)
class Pair:
    """One preference pair: all texts, or all lists of messages."""

    prompt: Content
    chosen: Content
    rejected: Content
    tools: list[Any] | None = None  # for the chat template
    template_options: dict[str, Any] | None = None  # for the chat template
    repeated_prompt: bool = False  # both responses began with the prompt; it was removed

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.prompt, list)


def parse_pair(row: Mapping[str, Any], data: DataConfig) -> Pair:
    """The pair of a row.

    Raises:
        BadRowError: a value is missing, empty, or in none of the layouts, or chosen and rejected
            are identical.
    """
    chosen = _content(row, data.chosen_column)
    rejected = _content(row, data.rejected_column)
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRowError("chosen and rejected are of different kinds")

    # The prompt has a column, or is what both responses begin with.
    prompt: Content
    repeated = False
    if data.prompt_column in row:
        prompt = _content(row, data.prompt_column)
        if isinstance(prompt, str) and isinstance(chosen, list):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list) and isinstance(chosen, str):
            raise BadRowError("the prompt is messages and the responses are texts")
        prompt, chosen, rejected, repeated = _without_prompt(prompt, chosen, rejected)
    else:
        prompt, chosen, rejected = _split_implicit_prompt(chosen, rejected, data)
    if data.system_column is not None:
        prompt = _with_system(row, prompt, data.system_column)

    # What can be trained on.
    _check_texts({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if chosen == rejected:
        raise BadRowError("chosen and rejected are identical")
    tools = _template_value(row, "tools", list)
    options = _template_value(row, "chat_template_kwargs", dict)
    if (tools or options) and isinstance(prompt, str):
        raise BadRowError("tools and chat_template_kwargs need messages, and the pair is texts")
    return Pair(prompt, chosen, rejected, tools, options, repeated)


def as_text(value: Content) -> str:
    """How an artifact stores it: a text as it is, messages as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _content(row: Mapping[str, Any], name: str) -> Content:
    value = row.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if isinstance(value, str):
        messages = _stored_messages(value)
        if messages is None:
            return value
        value = messages
    if not isinstance(value, list):
        kind = type(value).__name__
        raise BadRowError(f"{name} is neither text nor a list of messages", kind)
    return [_message(name, message) for message in value]


def _stored_messages(text: str) -> list[Any] | None:
    """The list of messages that a JSON string holds; None if the text is only a text."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    is_messages = isinstance(value, list) and all(
        isinstance(message, dict) and "role" in message for message in value
    )
    return value if is_messages else None


def _message(name: str, message: Any) -> Message:
    """A message with all its keys; those without a value are what Parquet adds."""
    if not isinstance(message, Mapping):
        raise BadRowError(f"{name} is neither text nor a list of messages", type(message).__name__)
    kept = {str(key): value for key, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise BadRowError(f"a message of {name} has no role")
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


def _without_prompt(
    prompt: Content, chosen: Content, rejected: Content
) -> tuple[Content, Content, Content, bool]:
    """Removes the prompt from responses that both begin with it: two layouts of one meaning."""
    length = len(prompt)
    if length and chosen[:length] == prompt and rejected[:length] == prompt:
        return prompt, chosen[length:], rejected[length:], True
    return prompt, chosen, rejected, False


def _split_implicit_prompt(
    chosen: Content, rejected: Content, data: DataConfig
) -> tuple[Content, Content, Content]:
    """The common beginning is the prompt, as in TRL's `extract_prompt`.

    Certain for messages that share their first turn. For texts only if the config asks for it; a
    text's prompt does not include the last space before the difference.
    """
    length = min(len(chosen), len(rejected))
    shared = next((i for i in range(length) if chosen[i] != rejected[i]), length)
    if isinstance(chosen, str):
        if not data.implicit_prompt:
            raise BadRowError(f"{data.prompt_column} is missing")
        if shared > 0 and chosen[shared - 1] == " ":
            shared -= 1
    elif shared == 0:
        raise BadRowError("chosen and rejected share no first message, and there is no prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _with_system(row: Mapping[str, Any], prompt: Content, name: str) -> Content:
    """The prompt with a system message in front; a row may have none."""
    system = row.get(name)
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise BadRowError(f"{name} is not text", type(system).__name__)
    if isinstance(prompt, str):
        raise BadRowError(f"{name} needs messages, and the pair is texts")
    if prompt and prompt[0]["role"] == "system":
        raise BadRowError(f"{name} is given, and the prompt has a system message")
    return [{"role": "system", "content": system}, *prompt]


def _template_value(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """`tools` or `chat_template_kwargs` of a row, perhaps as JSON, without Parquet's nulls."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRowError(f"{name} is not JSON") from None
    if value is None or len(value) == 0:
        return None
    if not isinstance(value, kind):
        raise BadRowError(f"{name} is not a {kind.__name__}", type(value).__name__)
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _check_texts(parts: Mapping[str, Content]) -> None:
    for name, value in parts.items():
        if not _says_something(value):
            raise BadRowError(f"{name} is empty")
        try:
            as_text(value).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(f"{name} is not valid Unicode (half a surrogate pair)") from None


def _says_something(value: Content) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return any(message.get("tool_calls") or _text_of(message).strip() for message in value)


def _text_of(message: Message) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)
