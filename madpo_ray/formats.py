"""Preference pairs in TRL's formats: rows of files, parsed and tokenised, or refused with a reason.

Standard (strings), conversational (lists of messages), and both with an implicit prompt (no `prompt` column: the
common beginning of chosen and rejected).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jinja2 import TemplateError

ROWS_PER_BATCH = 1024
Row = dict[str, Any]


class BadRowError(ValueError):
    """A row that goes to the rejects, with this reason."""


def read_file(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Rows of a file with their number, from 0; in place of a row that cannot be read, the reason."""
    if path.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_PER_BATCH):
            for row in batch.to_pylist():
                yield number, row
                number += 1
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                yield number, f"line is no JSON: {error}"
                continue
            yield number, row if isinstance(row, dict) else "line is no JSON object"


def parse_pair(row: Mapping[str, Any]) -> Row:
    """`prompt`, `chosen`, `rejected` of a row, with the prompt made explicit: all strings, or all lists of messages.

    Raises:
        BadRowError: a cell is missing, empty, or neither text nor messages, or chosen and rejected are the same.
    """
    chosen, rejected = (_cell(row, name) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise BadRowError("chosen and rejected are of different kinds")
    if "prompt" not in row:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    else:
        prompt = _cell(row, "prompt")
        if type(prompt) is not type(chosen):
            raise BadRowError("prompt and chosen are of different kinds")
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not _text(value).strip():
            raise BadRowError(f"{name} is empty")
    if chosen == rejected:
        raise BadRowError("chosen and rejected are identical")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _cell(row: Mapping[str, Any], name: str) -> str | list[dict[str, str]]:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    ):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    kind = (
        "missing"
        if value is None
        else f"neither text nor a list of messages with role and content ({type(value).__name__})"
    )
    raise BadRowError(f"{name} is {kind}")


def _text(value: str | list[dict[str, str]]) -> str:
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The common beginning as the prompt, as TRL's `extract_prompt`: a text's prompt does not take the last space
    along."""
    shared = next(
        (i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r), min(len(chosen), len(rejected))
    )
    if isinstance(chosen, str) and shared > 0 and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def tokenize_pair(pair: Row, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Token ids of prompt and responses, split on the tokens of the joint text; responses are cut to `max_length` in
    all.

    Text pairs get an end-of-sequence token (TRL's rule); in messages the chat template decides.

    Raises:
        BadRowError: the prompt alone fills max_length, a response has no tokens of its own, or the template treats the
        prompt
            differently before a response.
    """
    if isinstance(pair["prompt"], str):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        joint = [tokenizer(pair["prompt"] + pair[name])["input_ids"] for name in ("chosen", "rejected")]
        eos = tokenizer.eos_token_id
        # Some tokenizers append the end by themselves; a prompt must not end with it.
        if eos is not None and prompt and prompt[-1] == eos:
            prompt = prompt[:-1]
        joint = [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in joint]
    else:
        text = _render(tokenizer, pair["prompt"], add_generation_prompt=True)
        full = [_render(tokenizer, pair["prompt"] + pair[name]) for name in ("chosen", "rejected")]
        if not all(rendered.startswith(text) for rendered in full):
            raise BadRowError("the chat template renders the prompt differently before a response")
        prompt, *joint = (tokenizer(rendered, add_special_tokens=False)["input_ids"] for rendered in [text, *full])
    start = split_joint(prompt, *joint)
    if start == 0:
        raise BadRowError("prompt and response share no token")
    if start >= max_length:
        raise BadRowError(f"prompt of {start} tokens leaves no room for a response in max_length {max_length}")
    responses = [ids[start:max_length] for ids in joint]
    if not all(responses):
        raise BadRowError("a response has no tokens of its own")
    if responses[0] == responses[1]:
        raise BadRowError("chosen and rejected are identical within max_length")
    return {"prompt_ids": prompt[:start], "chosen_ids": responses[0], "rejected_ids": responses[1]}


def split_joint(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Where the responses begin, given the tokens of the prompt alone and of prompt + response for both responses.

    A tokenizer may merge the prompt's end with the response's begin; the merged token then belongs to the response.
    """
    shared = min(len(prompt), len(chosen), len(rejected))
    for k in range(shared):
        if not prompt[k] == chosen[k] == rejected[k]:
            return k
    return shared


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:  # such as "roles must alternate", which a template raises by itself
        raise BadRowError(f"the chat template refuses the messages: {error}") from None
    return rendered
