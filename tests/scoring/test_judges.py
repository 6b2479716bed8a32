"""Rewards of classifiers of others and of Python functions, from texts or messages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.data.messages import as_text
from madpo_ray.errors import UserError
from madpo_ray.models.loading import READS_END
from madpo_ray.passes import REFUSAL, BatchNotes
from madpo_ray.scoring.actors import ScoringActor
from madpo_ray.scoring.judges import ClassifierReward, FunctionReward, find_function
from madpo_ray.scoring.scorers import score_or_explain
from support.models import make_reward_model, make_tokenizer
from support.pairs import make_rows

CPU = torch.device("cpu")


def table(*, conversational: bool, count: int = 7) -> pa.Table:
    """Pairs as stage `pairs` stores them."""
    names = ("prompt", "chosen", "rejected")
    rows = make_rows(count, conversational=conversational)
    texts = [{name: as_text(row[name]) for name in names} for row in rows]
    return pa.Table.from_pylist([{"pair_id": str(i), **row} for i, row in enumerate(texts)])


def save(folder: Path, model: Any = None, **config: Any) -> Path:
    model = model or make_reward_model()
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def scorer_of(folder: Path, batch_size: int = 4) -> ClassifierReward:
    model = ModelConfig(model_name_or_path=str(folder))
    return ClassifierReward(folder, model, forward=ForwardOptions(batch_size), key="reward.source")


def own_rewards(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """As transformers gives them for one text at a time, (2, pairs)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rewards = []
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            for row in rows:
                if isinstance(row["prompt"], str):
                    text = row["prompt"] + row[side]
                else:
                    messages = row["prompt"] + row[side]
                    text = tokenizer.apply_chat_template(messages, tokenize=False)
                encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
                rewards.append(float(model(encoded["input_ids"]).logits))
    return np.array(rewards).reshape(2, -1)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("pad_token_id", [0, 2, None])
def test_classifier_gives_its_own_rewards(
    pad_token_id: int | None, conversational: bool, tmp_path: Path
) -> None:
    """In batches, whichever token it pads with: none, or the one that ends every text."""
    folder = save(tmp_path, pad_token_id=pad_token_id)
    scorer = scorer_of(folder)
    scorer.load(CPU)
    scores = scorer(table(conversational=conversational))
    expected = own_rewards(folder, make_rows(7, conversational=conversational))
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_classifier_keeps_its_own_dtype(tmp_path: Path) -> None:
    """The config's is of the models that are trained."""
    scorer = scorer_of(save(tmp_path, make_reward_model().to(torch.bfloat16)))
    scorer.load(CPU)
    assert {weight.dtype for weight in scorer._model.parameters()} == {torch.bfloat16}
    assert scorer._padding is not None
    assert np.isfinite(scorer(table(conversational=False))).all()


def test_classifier_without_sdpa_reads_batches(tmp_path: Path) -> None:
    """An encoder, whose pooled first token does not see padding."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    folder = save(tmp_path, AutoModelForSequenceClassification.from_config(config).eval())
    scorer = scorer_of(folder)
    scorer.load(CPU)
    expected = own_rewards(folder, make_rows(7))
    np.testing.assert_allclose(scorer(table(conversational=False)), expected, atol=1e-4)


def test_classifier_of_two_labels_is_refused(tmp_path: Path) -> None:
    model = make_reward_model()
    model.score = torch.nn.Linear(model.config.hidden_size, 2, bias=False)
    model.config.num_labels = 2
    with pytest.raises(UserError, match=r"score\.weight"):
        scorer_of(save(tmp_path, model)).load(CPU)


def test_text_that_is_too_long_is_a_reject(tmp_path: Path) -> None:
    """One such pair does not end a pass."""
    rows = table(conversational=False)
    scorer = scorer_of(save(tmp_path))
    scorer.load(CPU)
    tokenizer = scorer._tokenizer
    pairs = rows.to_pylist()
    texts = [(one["prompt"] + one["chosen"], one["prompt"] + one["rejected"]) for one in pairs]
    lengths = [max(len(tokenizer(text)["input_ids"]) for text in both) for both in texts]
    limited = scorer_of(save(tmp_path, max_position_embeddings=max(lengths) - 1))
    limited.load(CPU)
    scores, reasons = score_or_explain(limited, rows)
    is_too_long = [length == max(lengths) for length in lengths]
    assert [bool(reason) for reason in reasons] == is_too_long == np.isnan(scores[0]).tolist()
    assert f"reads {max(lengths) - 1} (a lower data.max_length" in "".join(reasons)
    assert all(reason.startswith("too long for reward.source: ") for reason in reasons if reason)
    assert not all(is_too_long)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    """Known at the first rows: the reason travels as a column."""
    folder = save(tmp_path)
    (folder / "chat_template.jinja").unlink()
    rows = table(conversational=True)
    scored = ScoringActor([scorer_of(folder)], 1, BatchNotes(tmp_path))(rows)
    assert "has no chat template" in scored[REFUSAL][0].as_py()


def length_reward(prompts: list[Any], completions: list[Any]) -> list[float]:
    """For the tests below: how long a completion is, and how many messages it has."""
    assert len(prompts) == len(completions)
    return [float(len(json.dumps(completion))) for completion in completions]


def too_few(prompts: list[Any], completions: list[Any]) -> list[float]:
    return [1.0]


@pytest.mark.parametrize("conversational", [False, True])
def test_function_gets_texts_or_messages(conversational: bool) -> None:
    """With TRL's signature."""
    scorer = FunctionReward(f"{__name__}:length_reward", key="reward.source")
    scorer.load(CPU)
    scores = scorer(table(conversational=conversational))
    rows = make_rows(7, conversational=conversational)
    for side, own in zip(("chosen", "rejected"), scores, strict=True):
        assert own.tolist() == [len(json.dumps(row[side])) for row in rows]


def test_function_gives_a_reward_for_each(tmp_path: Path) -> None:
    scorer = FunctionReward(f"{__name__}:too_few", key="reward.source")
    scorer.load(CPU)
    with pytest.raises(UserError, match="gave 1 rewards for 7 completions"):
        scorer(table(conversational=False))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:f", "put its folder on PYTHONPATH"),
        ("json:no_function", "cannot be imported"),
        ("json:__name__", "is not a function"),
    ],
)
def test_function_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_function(name, "reward.source")


def test_models_trained_here_read_the_end_of_a_text(tmp_path: Path) -> None:
    """Their rewards were trained there; those of others read what they are given."""
    rewards = []
    for name, config in (("ours", {READS_END: True}), ("theirs", {})):
        scorer = scorer_of(save(tmp_path / name, **config))
        scorer.load(torch.device("cpu"))
        rewards.append(
            [scorer.rewards(["say 1:"], [text])[0] for text in ("good", "good<|im_end|>")]
        )
    ours, theirs = rewards
    assert ours[0] == ours[1] == theirs[1]
    assert theirs[0] != theirs[1]
