"""Token ids of prompt and responses."""

import copy
from typing import Any

import pytest

from madpo_ray.data.formats import BadRowError
from madpo_ray.data.tokens import split_joint, tokenize_pair
from support.pairs import messages

TEXT = {"prompt": "the film", "chosen": " is good", "rejected": " is bad"}
CONVERSATION = messages(prompt="p", chosen="a", rejected="b")


def test_text_ends_with_eos(tokenizer: Any) -> None:
    tokens = tokenize_pair(TEXT, tokenizer, 64)
    for side in ("chosen", "rejected"):
        joint = tokenizer(TEXT["prompt"] + TEXT[side])["input_ids"]
        assert tokens["prompt_ids"] + tokens[f"{side}_ids"] == [*joint, tokenizer.eos_token_id]


def test_messages_follow_the_template(tokenizer: Any) -> None:
    """The prompt ends with the template's generation prompt."""
    tokens = tokenize_pair(CONVERSATION, tokenizer, 64)
    prompt = tokenizer.apply_chat_template(
        CONVERSATION["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert tokens["prompt_ids"] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(
            CONVERSATION["prompt"] + CONVERSATION[side], tokenize=False
        )
        joint = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens["prompt_ids"] + tokens[f"{side}_ids"] == joint


def test_merged_token_belongs_to_the_response(tokenizer: Any) -> None:
    """ "film" is one token, so "fi" + "lm" must not be split inside it."""
    joint = tokenizer("the film")["input_ids"]
    pair = {"prompt": "the fi", "chosen": "lm is", "rejected": "ne is"}
    tokens = tokenize_pair(pair, tokenizer, 64)
    prompt = tokens["prompt_ids"]
    assert prompt == joint[: len(prompt)]
    assert (prompt + tokens["chosen_ids"])[: len(joint)] == joint
    assert len(prompt) < len(tokenizer("the fi")["input_ids"])


def test_max_length_cuts_responses(tokenizer: Any) -> None:
    pair = {
        "prompt": "the film",
        "chosen": " is good good good good",
        "rejected": " is bad bad bad bad bad",
    }
    prompt = len(tokenize_pair(pair, tokenizer, 64)["prompt_ids"])
    tokens = tokenize_pair(pair, tokenizer, prompt + 3)
    assert [len(tokens[f"{side}_ids"]) for side in ("chosen", "rejected")] == [3, 3]
    with pytest.raises(BadRowError, match="leaves no room"):
        tokenize_pair(pair, tokenizer, prompt)
    with pytest.raises(BadRowError, match="identical within"):
        tokenize_pair(pair, tokenizer, prompt + 1)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ([1, 2], [1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 9, 3], [1, 2, 4], 1),  # merged in chosen: 2 + 3 -> 9
        ([1, 2], [1, 2, 3], [1, 9], 1),  # merged in rejected
        ([1, 2], [7, 2], [1, 2], 0),
    ],
)
def test_split_of_joint_tokens(
    prompt: list[int], chosen: list[int], rejected: list[int], expected: int
) -> None:
    assert split_joint(prompt, chosen, rejected) == expected


def test_refusing_template_rejects_the_row(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRowError, match="roles must alternate"):
        tokenize_pair(CONVERSATION, strict, 64)


def test_template_that_changes_the_prompt_is_refused(tokenizer: Any) -> None:
    changing = copy.deepcopy(tokenizer)
    changing.chat_template = "{{ messages|length }}{{ messages[-1]['content'] }}"
    with pytest.raises(BadRowError, match="renders the prompt differently"):
        tokenize_pair(CONVERSATION, changing, 64)
