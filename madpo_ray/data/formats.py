"""A row becomes a pair: prompt, chosen and rejected, as texts or as lists of messages.

The layouts that are read, with the columns' names from the config:

- texts: `prompt`, `chosen`, `rejected` (TRL's standard format);
- messages: all three as lists of messages (TRL's conversational format);
- a text as `prompt`, messages as `chosen` and `rejected`: the prompt is the first user message;
- messages that begin with the prompt, or share their first turns and have no `prompt`;
- texts that begin with the prompt; or, only if `data.implicit_prompt` is set, texts without a
  `prompt` column, whose common beginning is the prompt;
- transcripts as in Anthropic's HH, without a prompt: the response is what follows the last
  `Assistant:`.

A list of messages may be stored as a JSON string. Everything else is refused with a reason: nothing
is guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from madpo_ray.config import DataConfig
from madpo_ray.data.messages import (
    BadRowError,
    Content,
    UnreadColumnError,
    as_text,
    from_text,
    read_content,
    rest_after,
    says_something,
)
from madpo_ray.data.strict_json import parse_json

# Columns whose names say that they belong to the prompt. They are mapped, named in
# data.ignore_columns, or empty: never left out silently.
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = (
    "history",
    "chat_history",
    "dialogue",
    "context",
    "passage",
    "background",
    "instruction",
    "input",
)
# No key of the config reads these.
OTHER_COLUMNS = (
    "documents",
    "functions",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
)

UNREAD = "belongs to the prompt and is not read"

# Characters from which on a prompt without a space is no short word.
MIN_LENGTH = 10
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how turns of a transcript begin

# Arguments of apply_chat_template that a row may not set.
RESERVED_OPTIONS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "messages",
        "tokenize",
        "tools",
    }
)


@dataclass(frozen=True)
class Pair:
    """One preference pair: all texts, or all lists of messages."""

    prompt: Content
    chosen: Content
    rejected: Content
    tools: list[Any] | None = None  # for the chat template
    template_options: dict[str, Any] | None = None  # for the chat template
    prompt_repeats: int = 0  # responses that began with the prompt; if 2, it was removed

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.prompt, list)


def parse_pair(row: Mapping[str, Any], data: DataConfig) -> Pair:
    """The pair of a row.

    Raises:
        BadRowError: a value is missing, empty, or in none of the layouts, chosen and rejected are
            identical, or another column belongs to the prompt.
    """
    try:
        return _parse_pair(row, data)
    except RecursionError:
        raise BadRowError("values are nested too deeply") from None


def _parse_pair(row: Mapping[str, Any], data: DataConfig) -> Pair:
    _check_prompt_parts(row, data)
    chosen = read_content(row, data.chosen_column)
    rejected = read_content(row, data.rejected_column)
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRowError("chosen and rejected are of different kinds")

    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, str) and value in row and value != getattr(data, f"{name}_column"):
            raise BadRowError(f"{name} is the name of a column, not a text", repr(value))

    # The prompt has a column, or is what both responses begin with.
    prompt: Content
    repeats = 0
    if row.get(data.prompt_column) is not None:
        prompt = read_content(row, data.prompt_column)
        if isinstance(prompt, str) and isinstance(chosen, list):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list) and isinstance(chosen, str):
            raise BadRowError("the prompt is messages and the responses are texts")
        prompt, chosen, rejected, repeats = _without_prompt(prompt, chosen, rejected)
    else:
        prompt, chosen, rejected = _split_implicit_prompt(chosen, rejected, data)
    if data.system_column is not None:
        prompt = _with_system(row, prompt, data.system_column)

    # What can be trained on.
    _check_texts({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    _check_roles({"chosen": chosen, "rejected": rejected})
    if chosen == rejected:
        raise BadRowError("chosen and rejected are identical")
    tools = _template_value(row, "tools", list, data)
    options = _template_value(row, "chat_template_kwargs", dict, data)
    if options and (taken := sorted(RESERVED_OPTIONS & options.keys())):
        raise BadRowError("chat_template_kwargs sets a reserved argument", ", ".join(taken))
    if (tools or options) and isinstance(prompt, str):
        raise BadRowError("tools and chat_template_kwargs need messages, and the pair is texts")
    return Pair(prompt, chosen, rejected, tools, options, repeats)


def _check_prompt_parts(row: Mapping[str, Any], data: DataConfig) -> None:
    """Raises UnreadColumnError if a column that belongs to the prompt would be left out."""
    read = {data.prompt_column, data.chosen_column, data.rejected_column, data.system_column}
    read |= {data.split_column, data.group_column, *data.ignore_columns}
    read |= set(data.kept_columns.values())
    ways = {
        **dict.fromkeys(SYSTEM_COLUMNS, ", or name it in data.system_column"),
        **dict.fromkeys(CONTEXT_COLUMNS, ", or put it into the prompt"),
        **dict.fromkeys(OTHER_COLUMNS, ""),
    }
    for name, value in row.items():
        other_way = ways.get(name.lower())
        if other_way is not None and name not in read and not _is_empty(value):
            raise UnreadColumnError(
                f"column {name!r} {UNREAD}: list it in data.ignore_columns to leave it out"
                f"{other_way}"
            )


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in it: null, NaN, blank text, or a container of such."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(_is_empty(part) for part in value.values())
    if isinstance(value, list):
        return all(_is_empty(part) for part in value)
    return value is None or value != value  # NaN is not equal to itself


def _without_prompt(
    prompt: Content, chosen: Content, rejected: Content
) -> tuple[Content, Content, Content, int]:
    """Removes the prompt from responses that both begin with it: two layouts of one meaning.

    Also returns how many did. If only one does, it may well quote the prompt; and so may both if
    the prompt is a short word: "Hello" is answered by "Hello".
    """
    rests = [rest_after(prompt, response) for response in (chosen, rejected)]
    repeats = sum(rest is not None for rest in rests)
    if repeats < 2:
        return prompt, chosen, rejected, repeats
    if isinstance(prompt, str) and len(prompt.split()) < 2 and len(prompt.strip()) < MIN_LENGTH:
        return prompt, chosen, rejected, 1
    chosen, rejected = (rest for rest in rests if rest is not None)
    return prompt, chosen, rejected, repeats


def _split_implicit_prompt(
    chosen: Content, rejected: Content, data: DataConfig
) -> tuple[Content, Content, Content]:
    """The common beginning is the prompt, as in TRL's `extract_prompt`.

    Certain for messages that share their first turn, and for transcripts. For other texts only if
    the config asks for it; a text's prompt does not include the last space before the difference.
    """
    if _is_transcript(chosen) and _is_transcript(rejected):
        return _split_transcripts(str(chosen), str(rejected))
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


def _is_transcript(text: Content) -> bool:
    return isinstance(text, str) and f"\n\n{text.lstrip()}".startswith(HUMAN) and ASSISTANT in text


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt, up to the last `Assistant:`, and what the assistant says there."""
    prompts, responses = [], []
    for name, text in {"chosen": chosen, "rejected": rejected}.items():
        before, _, response = text.rpartition(ASSISTANT)
        if HUMAN in response:
            raise BadRowError(f"{name} is a transcript in which the human speaks last")
        prompts.append(before + ASSISTANT)
        responses.append(response)
    if prompts[0] != prompts[1]:
        raise BadRowError("chosen and rejected are transcripts that differ in earlier turns")
    return prompts[0], responses[0], responses[1]


def _with_system(row: Mapping[str, Any], prompt: Content, name: str) -> Content:
    """The prompt with a system message in front; a row may have none."""
    system = row.get(name)
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise BadRowError(f"{name} is not text", type(system).__name__)
    if isinstance(prompt, str):
        raise UnreadColumnError(
            f"column {name!r} {UNREAD}: a system message needs messages, and the pairs are texts; "
            "put it into the prompt"
        )
    if prompt and prompt[0]["role"] == "system":
        raise BadRowError(f"{name} is given, and the prompt has a system message")
    return [{"role": "system", "content": system}, *prompt]


def _template_value(row: Mapping[str, Any], name: str, kind: type, data: DataConfig) -> Any:
    """`tools` or `chat_template_kwargs` of a row, perhaps as JSON."""
    value = None if name in data.ignore_columns else row.get(name)
    if isinstance(value, str):
        try:
            value, repeated = parse_json(value or "null")
        except (ValueError, RecursionError):
            raise BadRowError(
                f"{name} is not JSON; to leave the column out, list it in data.ignore_columns"
            ) from None
        if repeated is not None:
            raise BadRowError(f"a key of {name} appears twice", repr(repeated))
    if value in (None, "", [], {}):
        return None
    if not isinstance(value, kind):
        raise BadRowError(f"{name} is not a {kind.__name__}", type(value).__name__)
    return value


def _check_texts(parts: Mapping[str, Content]) -> None:
    for name, value in parts.items():
        if not says_something(value):
            raise BadRowError(f"{name} is empty")
        try:
            as_text(value).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(f"{name} is not valid Unicode (half a surrogate pair)") from None
        if isinstance(value, str) and _reads_as_messages(value):
            raise BadRowError(f"{name} is text that reads as stored messages")


def _reads_as_messages(text: str) -> bool:
    """Whether an artifact, which stores messages as text, would give back something else.

    Such as what is left of a response without its prompt.
    """
    try:
        return from_text(text) != text
    except BadRowError:
        return True


def _check_roles(responses: Mapping[str, Content]) -> None:
    """A response is not a prompt: it begins with the assistant, or with a tool's answer."""
    for name, value in responses.items():
        if isinstance(value, list) and value[0]["role"] in ("system", "developer", "user"):
            raise BadRowError(f"{name} begins with a message of another role", value[0]["role"])
