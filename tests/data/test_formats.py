"""The layouts of pairs that are read, and the reasons of those that are not."""

import json
from typing import Any

import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.formats import Pair, parse_pair
from madpo_ray.data.messages import BadRowError, UnreadColumnError, as_text
from support.pairs import messages

TEXTS = {"prompt": "p", "chosen": " a", "rejected": " b"}
CONVERSATION = messages(prompt="p", chosen="a", rejected="b")
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


def parsed(row: dict[str, Any], **settings: Any) -> Pair:
    return parse_pair(row, DataConfig(files=("x",), **settings))


def parts(pair: Pair) -> dict[str, Any]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


@pytest.mark.parametrize("row", [TEXTS, CONVERSATION])
def test_explicit_prompts_stay_as_they_are(row: dict[str, Any]) -> None:
    pair = parsed(row)
    assert parts(pair) == row
    assert pair.is_conversational is isinstance(row["prompt"], list)
    assert pair.prompt_repeats == 0


def test_columns_are_mapped() -> None:
    row = {"question": "p", "good": " a", "bad": " b"}
    columns = {"prompt_column": "question", "chosen_column": "good", "rejected_column": "bad"}
    assert parts(parsed(row, **columns)) == TEXTS


@pytest.mark.parametrize("rest", ['{"role": "user", "content": "hi"}', '[{"role": "user"}]'])
def test_rest_that_reads_as_messages_is_refused(rest: str) -> None:
    """An artifact stores messages as such a text, and would be read differently."""
    prompt = "Write a chat message as JSON.\n"
    row = {"prompt": prompt, "chosen": prompt + rest, "rejected": prompt + "no"}
    with pytest.raises(BadRowError, match="chosen is text that reads as stored messages"):
        parsed(row)
    assert parsed({**row, "chosen": prompt + "[1]"}).chosen == "[1]"


def test_text_prompt_with_messages() -> None:
    """The most used public layout: the responses hold the prompt as their first turn, or not."""
    plain = {**CONVERSATION, "prompt": "p"}
    repeated = {
        "prompt": "p",
        "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
        "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
    }
    assert parts(parsed(plain)) == parts(parsed(repeated)) == CONVERSATION
    assert parsed(repeated).prompt_repeats == 2
    assert parsed(plain).prompt_repeats == 0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "say hi", "chosen": "say hi there", "rejected": "say hi no"},
            {"prompt": "say hi", "chosen": " there", "rejected": " no"},
        ),
        (
            {
                "prompt": CONVERSATION["prompt"],
                "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
                "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
            },
            CONVERSATION,
        ),
        # With other white space around it.
        (
            {"prompt": "say hi\n", "chosen": " say hi there", "rejected": "say hi\nno"},
            {"prompt": "say hi\n", "chosen": "there", "rejected": "no"},
        ),
        # Without any.
        (
            {
                "prompt": "你能说你好吗，朋友？谢谢",
                "chosen": "你能说你好吗，朋友？谢谢。好",
                "rejected": "你能说你好吗，朋友？谢谢！",
            },
            {"prompt": "你能说你好吗，朋友？谢谢", "chosen": "。好", "rejected": "！"},
        ),
        (
            {
                "prompt": "<|user|>hi<|end|>",
                "chosen": "<|user|>hi<|end|>a",
                "rejected": "<|user|>hi<|end|>b",
            },
            {"prompt": "<|user|>hi<|end|>", "chosen": "a", "rejected": "b"},
        ),
        # Before the messages of an answer.
        (
            {
                "prompt": "p",
                "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
                "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
            },
            CONVERSATION,
        ),
    ],
)
def test_repeated_prompt_is_removed(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two layouts of one meaning."""
    pair = parsed(row)
    assert parts(pair) == expected
    assert pair.prompt_repeats == 2


def test_prompt_in_one_response_stays() -> None:
    """Then it may be what that response says; it is counted."""
    row = {"prompt": "hi", "chosen": "hi you", "rejected": "no"}
    assert parts(parsed(row)) == row
    assert parsed(row).prompt_repeats == 1


@pytest.mark.parametrize(("prompt", "repeats"), [("Say Hi", 0), ("Say Hi ", 2), ("Say Hi\n", 2)])
def test_prompt_splits_no_word(prompt: str, repeats: int) -> None:
    """ "Say Hi" is no prompt of "Say Hinduism"."""
    row = {"prompt": prompt, "chosen": f"{prompt}nduism", "rejected": f"{prompt}story"}
    assert parsed(row).prompt_repeats == repeats


@pytest.mark.parametrize("prompt", ["Hello", "Hello!", " Hello\n"])
def test_short_words_may_be_the_answer(prompt: str) -> None:
    """Then nothing is removed, and it is counted."""
    row = {"prompt": prompt, "chosen": "Hello! How are you?", "rejected": "Hello! What?"}
    pair = parsed(row)
    assert parts(pair) == row
    assert pair.prompt_repeats <= 1


def test_response_that_is_the_prompt_is_empty() -> None:
    row = {"prompt": "What is 2?", "chosen": "What is 2? two", "rejected": "What is 2?"}
    with pytest.raises(BadRowError, match="rejected is empty"):
        parsed(row)


def test_deep_values_are_a_reason() -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    row = {**CONVERSATION, "chosen": [{"role": "assistant", "content": "a", "x": deep}]}
    with pytest.raises(BadRowError, match="values are nested too deeply"):
        parsed(row)


@pytest.mark.parametrize("empty", [{"prompt": None}, {}])
def test_null_prompt_is_none(empty: dict[str, Any]) -> None:
    """As some rows of a mixed file have it: their messages hold the prompt."""
    row = {
        "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
        "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
    }
    assert parts(parsed({**row, **empty})) == CONVERSATION


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("system", "be brief"),
        ("history", [["hi", "hello"]]),
        ("images", [{"bytes": "x"}]),
        ("input", "a table"),
    ],
)
def test_what_belongs_to_the_prompt_is_not_left_out(name: str, value: Any) -> None:
    row = {**CONVERSATION, name: value}
    with pytest.raises(
        BadRowError,
        match=f"column '{name}' belongs to the prompt and is not read: .*data.ignore_columns",
    ):
        parsed(row)
    assert parts(parsed(row, ignore_columns=(name,))) == CONVERSATION
    for empty in (None, "", []):
        assert parts(parsed({**row, name: empty})) == CONVERSATION


def test_mapped_columns_are_read() -> None:
    row = {"input": "p", "chosen": " a", "rejected": " b", "context": "web"}
    pair = parsed(row, prompt_column="input", group_column="context")
    assert parts(pair) == TEXTS


def test_tools_that_are_names_can_be_left_out() -> None:
    row = {**CONVERSATION, "tools": "calculator, search"}
    with pytest.raises(BadRowError, match=r"tools is not JSON; .* in data\.ignore_columns"):
        parsed(row)
    assert parsed(row, ignore_columns="tools").tools is None
    assert parsed({**row, "tools": ""}).tools is None
    with pytest.raises(BadRowError, match="a key of tools appears twice: 'a'"):
        parsed({**row, "tools": '[{"a": 1, "a": 2}]'})


def test_messages_that_share_their_first_turn() -> None:
    row = {
        "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
        "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
    }
    assert parts(parsed(row)) == CONVERSATION


def test_implicit_prompt_of_texts_has_to_be_asked_for() -> None:
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    with pytest.raises(BadRowError, match="prompt is missing"):
        parsed(row)
    expected = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
    assert parts(parsed(row, implicit_prompt=True)) == expected


TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What is two?\n\nAssistant:"


@pytest.mark.parametrize("before", ["", "\n"])
@pytest.mark.parametrize("implicit_prompt", [False, True])
def test_transcripts_are_split_at_the_last_turn(before: str, implicit_prompt: bool) -> None:
    """Not within a word that both responses begin with; nothing has to be asked for."""
    turns = before + TURNS.lstrip() if before else TURNS
    row = {"chosen": f"{turns} That is 2", "rejected": f"{turns} Thanks"}
    expected = {"prompt": turns, "chosen": " That is 2", "rejected": " Thanks"}
    assert parts(parsed(row, implicit_prompt=implicit_prompt)) == expected
    longer = {**row, "chosen": f"{turns} Thanks a lot"}
    assert parts(parsed(longer))["chosen"] == " Thanks a lot"


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (f"{TURNS} two\n\nHuman: sure?", "chosen is a transcript in which the human speaks last"),
        (
            f"{TURNS} 2\n\nHuman: sure?\n\nAssistant: yes",
            "transcripts that differ in earlier turns",
        ),
        (f"{TURNS} ", "chosen is empty"),
        ("\n\nHuman: Hi", "prompt is missing"),
    ],
)
def test_transcripts_that_are_no_pair(chosen: str, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parsed({"chosen": chosen, "rejected": f"{TURNS} three"})


def test_messages_stored_as_json() -> None:
    row = {name: json.dumps(value) for name, value in CONVERSATION.items()}
    assert parts(parsed(row)) == CONVERSATION
    spaced = {name: f"\n{text}".replace("[{", "[ {") for name, text in row.items()}
    assert parts(parsed(spaced)) == CONVERSATION
    assert parts(parsed({name: as_text(value) for name, value in CONVERSATION.items()})) == (
        CONVERSATION
    )


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[{",
        '[{"a": 1}]',
        "{}",
        '{"role": 1}',
        '{"a": 1, "a": 2}',
        "[" * 99999,
        "null",
        "12",
    ],
)
def test_text_that_looks_like_json_stays_text(text: str) -> None:
    assert parsed({**TEXTS, "chosen": text}).chosen == text


def test_every_key_of_a_message_is_kept() -> None:
    """Names, tool calls with null content, parts of text; keys without a value are none."""
    chosen = [{**CALL, "content": None, "name": "bot", "weight": None}]
    rejected = [{"role": "assistant", "content": [{"type": "text", "text": "b", "url": None}]}]
    pair = parsed({"prompt": CONVERSATION["prompt"], "chosen": chosen, "rejected": rejected})
    assert pair.chosen == [{**CALL, "name": "bot"}]
    assert pair.rejected == [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]


def test_null_is_an_argument() -> None:
    """A pair may differ in nothing else."""
    call = json.loads(json.dumps(CALL).replace('"x": 1', '"x": 1, "y": null'))
    pair = parsed({**CONVERSATION, "chosen": [call], "rejected": [CALL]})
    assert pair.chosen == [call]


def test_pairs_that_differ_in_a_call_are_pairs() -> None:
    other = json.loads(json.dumps(CALL).replace('"x": 1', '"x": 2'))
    pair = parsed({"prompt": CONVERSATION["prompt"], "chosen": [CALL], "rejected": [other]})
    assert pair.chosen != pair.rejected


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_options(as_json: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f", "default": None}}]
    options = {"enable_thinking": False}
    row: dict[str, Any] = {**CONVERSATION, "tools": tools, "chat_template_kwargs": options}
    if as_json:
        row |= {"tools": json.dumps(tools), "chat_template_kwargs": json.dumps(options)}
    pair = parsed(row)
    assert pair.tools == tools
    assert pair.template_options == options


def test_system_column() -> None:
    row = {**CONVERSATION, "system": "be brief"}
    system = {"role": "system", "content": "be brief"}
    assert parsed(row, system_column="system").prompt == [system, *CONVERSATION["prompt"]]
    assert parsed({**row, "system": None}, system_column="system").prompt == row["prompt"]
    with pytest.raises(BadRowError, match="needs messages"):
        parsed({**TEXTS, "system": "be brief"}, system_column="system")
    twice = {**row, "prompt": [system, *row["prompt"]]}
    with pytest.raises(BadRowError, match="the prompt has a system message"):
        parsed(twice, system_column="system")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen is neither text nor a list"),
        ({"prompt": "p", "chosen": [3], "rejected": [3]}, "chosen is neither text nor a list"),
        ({"prompt": "p", "chosen": "a"}, "rejected is missing"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({**messages(prompt="p", chosen="a"), "rejected": "b"}, "of different kinds"),
        ({**TEXTS, "prompt": CONVERSATION["prompt"]}, "prompt is messages and the responses are"),
        ({"chosen": [CALL], "rejected": CONVERSATION["chosen"]}, "share no first message"),
        ({**CONVERSATION, "chosen": [{"content": "a"}]}, "a message of chosen has no role"),
        ({**CONVERSATION, "chosen": [{"role": "user"}]}, "neither content nor tool_calls"),
        ({**CONVERSATION, "chosen": [{"role": "user", "content": 1}]}, "neither text nor parts"),
        (
            {**CONVERSATION, "chosen": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part that is not text: image",
        ),
        ({**CONVERSATION, "chosen": [{"role": "gpt", "content": "a"}]}, "unknown role: 'gpt'"),
        ({**CONVERSATION, "chosen": CONVERSATION["prompt"]}, "chosen begins with a message of an"),
        (
            {**TEXTS, "chosen": "[{'role': 'assistant', 'content': 'a'}]"},
            "Python text, not as JSON",
        ),
        ({**TEXTS, "chosen": '[{"from": "gpt", "value": "a"}]'}, "stored messages lack a role"),
        ({**TEXTS, "chosen": '{"role": "assistant", "content": "a"}'}, "without its list"),
        ({**TEXTS, "chosen": '[{"role": "user", "role": "x", "content": ""}]'}, "appears twice"),
        ({**TEXTS, "tools": [{"a": 1}]}, "need messages"),
        ({**CONVERSATION, "chat_template_kwargs": {"tokenize": True}}, "a reserved argument"),
        ({**CONVERSATION, "tools": {"a": 1}}, "tools is not a list"),
        ({**CONVERSATION, "chat_template_kwargs": "{"}, "chat_template_kwargs is not JSON"),
        ({**TEXTS, "chosen": " good \ud83d"}, "chosen is not valid Unicode"),
        ({**messages(prompt="\ud83d", chosen="a", rejected="b")}, "prompt is not valid Unicode"),
    ],
)
def test_bad_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parsed(row)


def test_kind_of_a_reason_has_no_values() -> None:
    with pytest.raises(BadRowError) as error:
        parsed({**TEXTS, "chosen": 3})
    assert str(error.value) == "chosen is neither text nor a list of messages: int"
    assert error.value.kind == "chosen is neither text nor a list of messages"


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_responses_are_the_assistants(role: str) -> None:
    row = {**CONVERSATION, "chosen": [{"role": role, "content": "a"}]}
    with pytest.raises(BadRowError, match=f"chosen begins with a message of another role: {role}"):
        parsed(row)


@pytest.mark.parametrize(
    "role", ["system", "developer", "user", "assistant", "tool", "function", "ipython"]
)
def test_roles_of_chat_templates(role: str) -> None:
    prompt = [{"role": role, "content": "p"}]
    assert parsed({**CONVERSATION, "prompt": prompt}).prompt == prompt


RESERVED = ["add_generation_prompt", "chat_template", "continue_final_message", "conversation"]


@pytest.mark.parametrize("name", [*RESERVED, "messages", "tokenize", "tools"])
def test_rows_set_no_reserved_argument(name: str) -> None:
    row = {**CONVERSATION, "chat_template_kwargs": {name: 1}}
    with pytest.raises(BadRowError, match=f"a reserved argument: {name}"):
        parsed(row)


def test_empty_tools_are_none() -> None:
    row = {**CONVERSATION, "tools": [], "chat_template_kwargs": {}}
    assert parsed(row) == parsed(CONVERSATION)


@pytest.mark.parametrize(
    ("parts_of_content", "reason"),
    [
        ([{"type": "text", "text": 1}], "a part that is not text: text"),
        ([{"type": "image", "text": "a"}], "a part that is not text: image"),
        ([{"type": "text", "text": " "}, {"type": "text", "text": " "}], "chosen is empty"),
    ],
)
def test_parts_of_content(parts_of_content: list[Any], reason: str) -> None:
    row = {**CONVERSATION, "chosen": [{"role": "assistant", "content": parts_of_content}]}
    with pytest.raises(BadRowError, match=reason):
        parsed(row)


STORED = [
    '[{"role": "assistant", "content": "a\nline"}]',  # a raw newline is no JSON
    '\ufeff[{"role": "assistant", "content": "a"}]',
    '[{"role": "assistant", "content": "a"},]',
    json.dumps(json.dumps([{"role": "assistant", "content": "a"}])),
    '[[{"role": "assistant", "content": "a"}]]',
    '{"messages": [{"role": "assistant", "content": "a"}]}',
    '{"from": "gpt", "value": "a"}',
    '[{"Role": "assistant", "Content": "a"}]',
    "{'role': 'assistant', 'content': 'a'}",
    "array([{'content': 'a', 'role': 'assistant'}], dtype=object)",
]


@pytest.mark.parametrize("text", STORED)
def test_texts_that_look_like_messages_are_no_texts(text: str) -> None:
    with pytest.raises(BadRowError, match="messages"):
        parsed({**TEXTS, "chosen": text})


@pytest.mark.parametrize("name", ["System", "system_message", "chat_history", "passage"])
def test_other_names_of_what_belongs_to_the_prompt(name: str) -> None:
    with pytest.raises(BadRowError, match=f"column '{name}' belongs to the prompt"):
        parsed({**CONVERSATION, name: "x"})


@pytest.mark.parametrize(
    "empty", [" ", float("nan"), {"bytes": None, "path": None}, [None], [[]], [""]]
)
def test_nothing_in_a_column_is_left_out(empty: Any) -> None:
    assert parts(parsed({**CONVERSATION, "images": empty})) == CONVERSATION


def test_names_of_columns_are_no_responses() -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y"}
    with pytest.raises(BadRowError, match=r"chosen is the name of a column.*response_a"):
        parsed({**row, "chosen": "response_a", "rejected": "response_b"})


def test_system_of_texts_is_refused_early() -> None:
    with pytest.raises(UnreadColumnError, match="put it into the prompt"):
        parsed({**TEXTS, "system": "be brief"}, system_column="system")


LEFT_OUT = ["documents", "functions", "image", "images", "video", "videos", "audio", "audios"]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_columns_that_no_key_reads(name: str) -> None:
    with pytest.raises(BadRowError, match=f"column '{name}' belongs to .* to leave it out$"):
        parsed({**CONVERSATION, name: ["x"]})


def test_system_that_is_no_text_is_a_reason() -> None:
    with pytest.raises(BadRowError, match="system is not text: int"):
        parsed({**CONVERSATION, "system": 1}, system_column="system")


def test_implicit_prompts_are_not_repeated() -> None:
    row = {
        "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
        "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
    }
    assert parsed(row).prompt_repeats == 0


def test_implicit_prompt_of_texts_that_share_nothing_is_empty() -> None:
    with pytest.raises(BadRowError, match="prompt is empty"):
        parsed({"chosen": "a ", "rejected": "b "}, implicit_prompt=True)


@pytest.mark.parametrize("prompt", ["say hi", " say hi", "say hi "])
def test_responses_that_do_not_begin_with_the_prompt(prompt: str) -> None:
    row = {"prompt": prompt, "chosen": "I say hi there", "rejected": "no"}
    assert parts(parsed(row)) == row
    assert parsed(row).prompt_repeats == 0
