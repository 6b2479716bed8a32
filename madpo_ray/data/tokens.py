"""A pair becomes token ids: the prompt once, and each response."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from madpo_ray import columns
from madpo_ray.data.formats import Pair
from madpo_ray.data.messages import BadRowError, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


class Tokens(NamedTuple):
    """The token ids of a pair."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    num_cut: int  # responses that were cut at max_length

    def as_columns(self) -> dict[str, Ids | int]:
        """Ids and their numbers, by the names of an artifact's columns."""
        ids = dict(
            zip(columns.TOKEN_COLUMNS, (self.prompt, self.chosen, self.rejected), strict=True)
        )
        return ids | {columns.LENGTHS[name]: len(own) for name, own in ids.items()}


# A pair that is left out because of data.over_length.
TOO_LONG = "prompt + response is longer than max_length"


class JointTexts(NamedTuple):
    """The texts of a pair to tokenise: the prompt by itself, and before each response."""

    prompt: str
    chosen: str
    rejected: str
    is_rendered: bool  # by a chat template, which writes the special tokens itself


def joint_texts(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> JointTexts:
    """The texts of a pair. Raises BadRowError if the chat template does not fit it."""
    if pair.is_conversational:
        return _rendered(pair, tokenizer)
    assert isinstance(pair.prompt, str)
    assert isinstance(pair.chosen, str)
    assert isinstance(pair.rejected, str)
    return JointTexts(
        pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected, is_rendered=False
    )


def tokenize(
    texts: Sequence[JointTexts], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[Ids, Ids, Ids] | Exception]:
    """Ids of prompt and both joint texts of each pair, or what the tokenizer raised for it.

    In one call for all, which the fast tokenizers spread over threads.
    """
    try:
        return list(_tokenize_all(texts, tokenizer))
    except Exception as error:  # about one of the pairs
        if len(texts) == 1:
            return [error]
        return [tokenize([one], tokenizer)[0] for one in texts]


def _tokenize_all(
    texts: Sequence[JointTexts], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Ids, Ids, Ids]]:
    # One call for rendered texts, and one for plain ones.
    rendered = iter(_tokenize_rendered([one for one in texts if one.is_rendered], tokenizer))
    plain = iter(_tokenize_plain([one for one in texts if not one.is_rendered], tokenizer))
    for one in texts:
        yield next(rendered if one.is_rendered else plain)


def _tokenize_rendered(
    texts: Sequence[JointTexts], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[Ids, Ids, Ids]]:
    """What the texts of a pair begin with is tokenised once, up to where it can be cut."""
    if not texts:
        return []
    parts = []
    for one in texts:
        cut = last_cut(one.prompt, tokenizer)
        parts += [one.prompt[:cut], one.prompt[cut:], one.chosen[cut:], one.rejected[cut:]]
    ids = tokenizer(parts, add_special_tokens=False)["input_ids"]
    of_pairs = zip(ids[0::4], ids[1::4], ids[2::4], ids[3::4], strict=True)
    return [
        (head + prompt, head + chosen, head + rejected)
        for head, prompt, chosen, rejected in of_pairs
    ]


def _tokenize_plain(
    texts: Sequence[JointTexts], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[Ids, Ids, Ids]]:
    if not texts:
        return []
    parts = [part for one in texts for part in (one.prompt, one.chosen, one.rejected)]
    ids = tokenizer(parts, add_special_tokens=True)["input_ids"]
    of_pairs = zip(ids[0::3], ids[1::3], ids[2::3], strict=True)
    return [_with_ends(*of_pair, tokenizer) for of_pair in of_pairs]


def last_cut(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The last place where a text can be cut in two that have the ids of the whole; 0 if none."""
    added, safe = _added_tokens(tokenizer)
    place = 0
    if safe:
        for match in added.finditer(text):
            if match.group() in safe:
                place = match.start()
    return place


@functools.lru_cache(maxsize=8)
def _added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[re.Pattern[str], frozenset[str]]:
    """What matches a tokenizer's added tokens, and those before which a text can be cut.

    The fast tokenizers split a text at its added tokens, such as those of a chat template, before
    anything else; the parts do not affect each other. A token may take spaces before it, or be part
    of a longer one; it is not one to cut at.
    """
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return re.compile(""), frozenset()
    added = [one for one in tokenizer.added_tokens_decoder.values() if not one.normalized]
    contents = sorted((one.content for one in added), key=len, reverse=True)
    safe = {
        one.content
        for one in added
        if not (one.lstrip or one.single_word)
        and not any(other.find(one.content) > 0 for other in contents)
    }
    return re.compile("|".join(map(re.escape, contents))), frozenset(safe)


def tokenize_pair(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    may_truncate: bool = True,
) -> Tokens:
    """`split_tokens` of one pair. Raises BadRowError, and whatever the tokenizer raises."""
    (ids,) = tokenize([joint_texts(pair, tokenizer)], tokenizer)
    if isinstance(ids, Exception):
        raise ids
    return split_tokens(*ids, max_length, may_truncate=may_truncate)


def split_tokens(
    prompt: Ids, chosen: Ids, rejected: Ids, max_length: int, *, may_truncate: bool = True
) -> Tokens:
    """Token ids of prompt and responses, split on the tokens of the joint texts.

    Responses are cut so that prompt + response has at most `max_length` tokens.

    Raises:
        BadRowError: the prompt by itself fills `max_length`, a response has no tokens of its own,
            or a response would have to be cut and may not be.
    """
    longest = max(len(chosen), len(rejected))
    if longest > max_length and not may_truncate:
        raise BadRowError(TOO_LONG, f"{longest} of {max_length} tokens")

    # Where the responses begin.
    start = split_joint(prompt, chosen, rejected)
    if start == 0:
        raise BadRowError("prompt and response share no token")
    if start >= max_length:
        raise BadRowError(
            "the prompt leaves no room for a response in max_length",
            f"{start} of {max_length} tokens",
        )

    # What of them fits.
    responses = [ids[start:max_length] for ids in (chosen, rejected)]
    if not all(responses):
        raise BadRowError("a response has no tokens of its own")
    if responses[0] == responses[1]:
        raise BadRowError("chosen and rejected are identical within max_length")
    num_cut = sum(len(ids) > max_length for ids in (chosen, rejected))
    return Tokens(prompt[:start], responses[0], responses[1], num_cut)


def split_joint(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Where the responses begin, given the tokens of the prompt by itself and of both joint texts.

    A tokenizer may merge the prompt's end with the response's beginning; the merged token then
    belongs to the response.
    """
    shared = min(len(prompt), len(chosen), len(rejected))
    for i in range(shared):
        if not prompt[i] == chosen[i] == rejected[i]:
            return i
    return shared


def _with_ends(
    prompt: Ids, chosen: Ids, rejected: Ids, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Ids, Ids, Ids]:
    """Texts with one beginning, if the tokenizer adds one, and one end of sequence (TRL's rule)."""
    bos = tokenizer.bos_token_id
    eos = tokenizer.eos_token_id
    if bos is not None:
        # The text may hold the beginning already, as a template rendered it.
        prompt, chosen, rejected = (
            ids[1:] if ids[:2] == [bos, bos] else ids for ids in (prompt, chosen, rejected)
        )
    if eos is None:
        return prompt, chosen, rejected
    # Some tokenizers append the end by themselves; a prompt must not end with it.
    if prompt[-1:] == [eos]:
        prompt = prompt[:-1]
    return prompt, _with_one_end(chosen, eos), _with_one_end(rejected, eos)


def _with_one_end(ids: Ids, eos: int) -> Ids:
    """The text may hold the end already, and the tokenizer may append another."""
    while ids[-1:] == [eos]:
        ids = ids[:-1]
    return [*ids, eos]


def _rendered(pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> JointTexts:
    assert isinstance(pair.prompt, list)
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    prompt = _render(tokenizer, pair, pair.prompt, add_generation_prompt=True)
    chosen = _render(tokenizer, pair, pair.prompt + pair.chosen)
    rejected = _render(tokenizer, pair, pair.prompt + pair.rejected)
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        raise BadRowError("the chat template renders the prompt differently before a response")
    _check_rendering("prompt", pair.prompt, prompt)
    _check_rendering("chosen", pair.chosen, chosen[len(prompt) :])
    _check_rendering("rejected", pair.rejected, rejected[len(prompt) :])
    if pair.tools:
        without_tools = dataclasses.replace(pair, tools=None)
        if _render(tokenizer, without_tools, pair.prompt, add_generation_prompt=True) == prompt:
            raise BadRowError("the chat template leaves out the tools")
    return JointTexts(prompt, chosen, rejected, is_rendered=True)


def _check_rendering(name: str, messages: list[Message], rendered: str) -> None:
    """Raises BadRowError if a chat template leaves out what messages say.

    White space does not count: templates strip it. Earlier answers of the assistant may lose their
    reasoning.
    """
    shown = _without_spaces(rendered)
    for message in messages:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        is_history = name == "prompt" and message["role"] == "assistant"
        if not is_history and not all(_without_spaces(text) in shown for text in texts):
            raise BadRowError(f"the chat template leaves out text of a message of {name}")
        if not isinstance(content, str) and _without_spaces(str(content[:1])[1:-1]) in shown:
            raise BadRowError("the chat template writes parts of content as Python text")
        for call in message.get("tool_calls") or ():
            if str(call.get("function", call).get("name", "")) not in rendered:
                raise BadRowError(f"the chat template leaves out a tool call of {name}")


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    pair: Pair,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    options = {"add_generation_prompt": add_generation_prompt, **(pair.template_options or {})}
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tools=pair.tools, tokenize=False, **options
        )
    # A template is a program of the model's: whatever it raises is about this row.
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise BadRowError("the chat template refuses the messages", detail) from None
    return rendered
