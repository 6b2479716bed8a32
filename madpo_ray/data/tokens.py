"""A pair becomes token ids: the prompt once, and each response."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from madpo_ray import columns
from madpo_ray.data.formats import BadRowError, Message
from madpo_ray.data.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


def tokenize_pair(
    pair: Row, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> dict[str, Ids]:
    """Token ids of prompt and responses, split on the tokens of the joint text.

    Responses are cut so that prompt + response has at most `max_length` tokens. Text pairs get an
    end-of-sequence token (TRL's rule); in messages the chat template decides.

    Raises:
        BadRowError: the prompt alone fills `max_length`, a response has no tokens of its own, or
            the template renders the prompt differently before a response.
    """
    if isinstance(pair[columns.PROMPT], str):
        prompt, chosen, rejected = _tokenize_texts(pair, tokenizer)
    else:
        prompt, chosen, rejected = _tokenize_messages(pair, tokenizer)

    start = split_joint(prompt, chosen, rejected)
    if start == 0:
        raise BadRowError("prompt and response share no token")
    if start >= max_length:
        raise BadRowError(
            f"prompt of {start} tokens leaves no room for a response in max_length {max_length}"
        )

    responses = [ids[start:max_length] for ids in (chosen, rejected)]
    if not all(responses):
        raise BadRowError("a response has no tokens of its own")
    if responses[0] == responses[1]:
        raise BadRowError("chosen and rejected are identical within max_length")
    return {
        columns.PROMPT_IDS: prompt[:start],
        columns.CHOSEN_IDS: responses[0],
        columns.REJECTED_IDS: responses[1],
    }


def split_joint(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Where the responses begin, given the tokens of the prompt alone and of both joint texts.

    A tokenizer may merge the prompt's end with the response's beginning; the merged token then
    belongs to the response.
    """
    shared = min(len(prompt), len(chosen), len(rejected))
    for i in range(shared):
        if not prompt[i] == chosen[i] == rejected[i]:
            return i
    return shared


def _tokenize_texts(pair: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids, Ids]:
    prompt_text = pair[columns.PROMPT]
    prompt = tokenizer(prompt_text)["input_ids"]
    chosen = tokenizer(prompt_text + pair[columns.CHOSEN])["input_ids"]
    rejected = tokenizer(prompt_text + pair[columns.REJECTED])["input_ids"]

    eos = tokenizer.eos_token_id
    if eos is None:
        return prompt, chosen, rejected
    # Some tokenizers append the end by themselves; a prompt must not end with it.
    if prompt[-1:] == [eos]:
        prompt = prompt[:-1]
    return prompt, _with_end(chosen, eos), _with_end(rejected, eos)


def _with_end(ids: Ids, eos: int) -> Ids:
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _tokenize_messages(pair: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids, Ids]:
    messages = pair[columns.PROMPT]
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    chosen = _render(tokenizer, messages + pair[columns.CHOSEN])
    rejected = _render(tokenizer, messages + pair[columns.REJECTED])
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        raise BadRowError("the chat template renders the prompt differently before a response")

    # The template writes the special tokens itself.
    def tokenize(text: str) -> Ids:
        ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return tokenize(prompt), tokenize(chosen), tokenize(rejected)


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:  # such as "roles must alternate", raised by the template itself
        raise BadRowError(f"the chat template refuses the messages: {error}") from None
    return rendered
