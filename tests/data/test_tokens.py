"""Token ids of prompt and responses."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from madpo_ray.config import DataConfig
from madpo_ray.data.formats import Pair, parse_pair
from madpo_ray.data.messages import BadRowError
from madpo_ray.data.tokens import JointTexts, last_cut, split_joint, tokenize, tokenize_pair
from support.pairs import messages

TEXT = Pair("the film", " is good", " is bad")
CONVERSATION = Pair(**messages(prompt="p", chosen="a", rejected="b"))


def with_special_tokens(tokenizer: Any, *, begin: bool = False, end: bool = False) -> Any:
    """The tokenizer, adding its beginning and its end by itself."""
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    template = " ".join([bos] * begin + ["$A"] + [eos] * end)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    return adding


def test_text_ends_with_eos(tokenizer: Any) -> None:
    tokens = tokenize_pair(TEXT, tokenizer, 64)
    for response, ids in ((" is good", tokens.chosen), (" is bad", tokens.rejected)):
        joint = tokenizer("the film" + response)["input_ids"]
        assert tokens.prompt + ids == [*joint, tokenizer.eos_token_id]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("rendered", [False, True])
def test_text_has_one_beginning_and_one_end(
    begin: bool, end: bool, rendered: bool, tokenizer: Any
) -> None:
    """Whatever the tokenizer adds, and whether a template rendered the text earlier."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    pair = TEXT
    if rendered:
        pair = Pair(bos + TEXT.prompt, " is good" + eos, " is bad" + eos)
    tokens = tokenize_pair(pair, with_special_tokens(tokenizer, begin=begin, end=end), 64)
    plain = tokenize_pair(TEXT, tokenizer, 64)
    beginning = [tokenizer.bos_token_id] if begin or rendered else []
    assert tokens.prompt == [*beginning, *plain.prompt]
    assert (tokens.chosen, tokens.rejected) == (plain.chosen, plain.rejected)


@pytest.mark.parametrize("begin", [False, True])
def test_messages_follow_the_template(begin: bool, tokenizer: Any) -> None:
    """The prompt ends with its generation prompt, and the tokenizer adds nothing."""
    adding = with_special_tokens(tokenizer, begin=begin, end=begin)
    tokens = tokenize_pair(CONVERSATION, adding, 64)
    prompt = tokenizer.apply_chat_template(
        CONVERSATION.prompt, tokenize=False, add_generation_prompt=True
    )
    assert tokens.prompt == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    responses = ((CONVERSATION.chosen, tokens.chosen), (CONVERSATION.rejected, tokens.rejected))
    for response, ids in responses:
        text = tokenizer.apply_chat_template(CONVERSATION.prompt + response, tokenize=False)
        joint = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens.prompt + ids == joint


def test_template_sees_tools_options_and_every_key(tokenizer: Any) -> None:
    """A call without content is a response."""
    seeing = copy.deepcopy(tokenizer)
    seeing.chat_template = (
        "{{ tools | tojson if tools else '' }}{{ style }}"
        "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls | tojson }};{% endfor %}"
    )
    row = {
        **messages(prompt="p", chosen="a"),
        "rejected": [{"role": "assistant", "tool_calls": [{"function": {"name": "good"}}]}],
        "tools": [{"name": "film"}],
        "chat_template_kwargs": {"style": "warm"},
    }
    pair = parse_pair(row, DataConfig(files=("x",)))
    tokens = tokenize_pair(pair, seeing, 200)
    decoded = tokenizer.decode(tokens.prompt + tokens.rejected)
    assert decoded.startswith('[{"name": "film"}]warmuser:p;assistant:[{"function"')
    assert "good" in tokenizer.decode(tokens.rejected)


def test_merged_token_belongs_to_the_response(tokenizer: Any) -> None:
    """ "film" is one token, so "fi" + "lm" must not be split inside it."""
    joint = tokenizer("the film")["input_ids"]
    tokens = tokenize_pair(Pair("the fi", "lm is", "ne is"), tokenizer, 64)
    assert tokens.prompt == joint[: len(tokens.prompt)]
    assert (tokens.prompt + tokens.chosen)[: len(joint)] == joint
    assert len(tokens.prompt) < len(tokenizer("the fi")["input_ids"])


def test_max_length_cuts_responses(tokenizer: Any) -> None:
    """And counts them."""
    pair = Pair("the film", " is good good good good", " is bad bad bad bad bad")
    uncut = tokenize_pair(pair, tokenizer, 64)
    assert uncut.num_cut == 0
    prompt = len(uncut.prompt)
    tokens = tokenize_pair(pair, tokenizer, prompt + 3)
    assert [len(tokens.chosen), len(tokens.rejected), tokens.num_cut] == [3, 3, 2]
    longer = max(len(uncut.chosen), len(uncut.rejected))
    assert tokenize_pair(pair, tokenizer, prompt + longer - 1).num_cut == 1
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


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles') }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ 2 ** 'a' }}"],
)
def test_failing_template_rejects_the_row(template: str, tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = template
    with pytest.raises(BadRowError, match="the chat template refuses the messages: "):
        tokenize_pair(CONVERSATION, strict, 64)


def test_template_that_changes_the_prompt_is_refused(tokenizer: Any) -> None:
    changing = copy.deepcopy(tokenizer)
    changing.chat_template = "{{ messages|length }}{{ messages[-1]['content'] }}"
    with pytest.raises(BadRowError, match="renders the prompt differently"):
        tokenize_pair(CONVERSATION, changing, 64)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_prompt_that_one_response_changes_is_refused(side: str, tokenizer: Any) -> None:
    """Either of them is enough."""
    changing = copy.deepcopy(tokenizer)
    content = {"chosen": "a", "rejected": "b"}[side]  # as CONVERSATION has them
    changing.chat_template = (
        "{% if messages[-1].content == '" + content + "' %}other {% endif %}"
        "{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    with pytest.raises(BadRowError, match="renders the prompt differently"):
        tokenize_pair(CONVERSATION, changing, 64)


def test_tools_are_looked_for_after_the_generation_prompt(tokenizer: Any) -> None:
    """Most templates end a prompt with the beginning of an answer."""
    ignoring = copy.deepcopy(tokenizer)
    ignoring.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    pair = Pair(ASKS, CONVERSATION.chosen, OTHER, tools=[{"name": "look"}])
    with pytest.raises(BadRowError, match="leaves out the tools"):
        tokenize_pair(pair, ignoring, 200)


def test_pair_without_a_shared_token_is_refused(tokenizer: Any) -> None:
    """ "the" is one token, "th" two others."""
    with pytest.raises(BadRowError, match="share no token"):
        tokenize_pair(Pair("th", "e film", "e plot"), tokenizer, 64)


SYSTEM = {"role": "system", "content": "be brief"}
ASKS = [{"role": "user", "content": "p"}]
THINKS = [{"role": "assistant", "content": "<think>long</think>good"}]
CALLS = [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "look"}}]}]
PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}]
OTHER = [{"role": "assistant", "content": "b"}]
SHOWN = "{{ m.role }}:{{ %s }};"


@pytest.mark.parametrize(
    ("content", "pair", "reason"),
    [
        (
            "m.content if m.role != 'system' else ''",
            Pair([SYSTEM, *ASKS], CONVERSATION.chosen, OTHER),
            "leaves out text of a message of prompt",
        ),
        (
            "m.content.split('</think>')[-1]",
            Pair(ASKS, THINKS, OTHER),
            "leaves out text of a message of chosen",
        ),
        ("m.content", Pair(ASKS, CALLS, OTHER), "leaves out a tool call of chosen"),
        ("m.content", Pair(ASKS, PARTS, OTHER), "writes parts of content as Python text"),
        (
            "m.content",
            Pair(ASKS, CONVERSATION.chosen, OTHER, tools=[{"name": "look"}]),
            "leaves out the tools",
        ),
    ],
)
def test_what_a_template_leaves_out_is_a_reason(
    content: str, pair: Pair, reason: str, tokenizer: Any
) -> None:
    ignoring = copy.deepcopy(tokenizer)
    ignoring.chat_template = "{% for m in messages %}" + SHOWN % content + "{% endfor %}"
    with pytest.raises(BadRowError, match=f"the chat template {reason}"):
        tokenize_pair(pair, ignoring, 200)


def test_templates_may_strip_and_drop_earlier_reasoning(tokenizer: Any) -> None:
    """As Qwen3's and DeepSeek's do."""
    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = (
        "{% for m in messages %}{{ m.role }}:"
        "{{ m.content.strip() if loop.last else m.content.split('</think>')[-1] | trim }};"
        "{% endfor %}"
    )
    pair = Pair([*ASKS, *THINKS, *ASKS], [{"role": "assistant", "content": " a \n"}], OTHER)
    tokens = tokenize_pair(pair, stripping, 200)
    assert "long" not in tokenizer.decode(tokens.prompt)


PIECES = [
    "<|a|>",
    "<|b|>",
    "<|a|",
    "|>",
    " ",
    "  ",
    "\n",
    "x",
    "Äé",
    "word",
    "\u2581",
    "<|ab|>",
    "<|b|>more",
]


def small_tokenizer(kind: str) -> Any:
    """Characters or bytes as tokens, and added tokens of several kinds."""
    characters = sorted({character for piece in PIECES for character in piece.lower() + piece})
    vocabulary = {character: i for i, character in enumerate(["<unk>", *characters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.add_special_tokens(["<|a|>"])
    match kind:
        case "first space":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        case "prepended":
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        case "lower case":
            backend.normalizer = normalizers.Lowercase()
            backend.add_tokens([AddedToken("WORD", normalized=True)])
        case "spaces before":
            backend.add_special_tokens([AddedToken("<|b|>", lstrip=True, rstrip=True)])
        case "part of another":
            backend.add_special_tokens(["<|b|>", "<|a|><|b|>", "x<|b|>", "<|b|>more"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


KINDS = ["plain", "first space", "prepended", "lower case", "spaces before", "part of another"]
TOKENIZERS = {kind: small_tokenizer(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8), min_size=3, max_size=3))
def test_cut_texts_have_the_ids_of_the_whole(kind: str, parts: list[list[str]]) -> None:
    """The three texts of a rendered pair share their beginning, which is tokenised once."""
    tokenizer = TOKENIZERS[kind]
    prompt, chosen, rejected = map("".join, parts)
    texts = JointTexts(prompt, prompt + chosen, prompt + rejected, is_rendered=True)
    (found,) = tokenize([texts], tokenizer)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[:3]]
    assert list(found) == expected


def test_a_conversation_is_cut_at_its_last_added_token(tokenizer: Any) -> None:
    text = "<|im_start|>user\nhello<|im_end|><|im_start|>assistant\n"
    assert text[last_cut(text, tokenizer) :] == "<|im_start|>assistant\n"
    assert last_cut("no added token", tokenizer) == 0
    assert last_cut("x<|b|>", TOKENIZERS["spaces before"]) == 0
