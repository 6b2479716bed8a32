"""Several scored responses to one prompt become pairs."""

import json
from typing import Any

import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.messages import BadRowError
from madpo_ray.data.responses import TIE, pairs_in

ROW = {"prompt": "p", "id": 7, "responses": ["a", "b", "c"], "scores": [1, 3.5, 2]}


def config(**changes: Any) -> DataConfig:
    columns = {"responses_column": "responses", "scores_column": "scores"}
    return DataConfig(files=("x",), **(columns | changes))


def chosen_and_rejected(row: dict[str, Any], **changes: Any) -> list[Any]:
    found = pairs_in(row, config(**changes))
    return [one if one == TIE else (one["chosen"], one["rejected"]) for one in found]


def test_row_without_responses_is_a_pair() -> None:
    data = DataConfig(files=("x",))
    assert list(pairs_in(ROW, data)) == [ROW]


def test_best_against_worst() -> None:
    """With their scores, and what else the row has."""
    (pair,) = pairs_in(ROW, config(pairing="best_vs_worst"))
    assert pair == {
        "prompt": "p",
        "id": 7,
        "chosen": "b",
        "rejected": "a",
        "score_chosen": 3.5,
        "score_rejected": 1.0,
    }


def test_all_pairs_the_better_one_chosen() -> None:
    found = chosen_and_rejected(ROW, pairing="all")
    assert found == [("b", "c"), ("b", "a"), ("c", "a")]


def test_equal_scores_make_no_pair() -> None:
    row = ROW | {"scores": [1, 1, 2]}
    assert chosen_and_rejected(row, pairing="all") == [("c", "a"), ("c", "b"), TIE]
    assert chosen_and_rejected(row | {"scores": [2, 2, 2]}, pairing="best_vs_worst") == [TIE]


def test_best_against_a_random_one() -> None:
    """Any of the others, by seed and content."""
    rows = [ROW | {"responses": ["a", f"b{i}", "c"]} for i in range(40)]
    drawn = [chosen_and_rejected(row, pairing="best_vs_random") for row in rows]
    assert [pair[0][0] for pair in drawn] == [f"b{i}" for i in range(40)]
    assert {pair[0][1] for pair in drawn} == {"a", "c"}
    assert drawn == [chosen_and_rejected(row, pairing="best_vs_random") for row in rows]
    data = config(pairing="best_vs_random")
    other = [next(pairs_in(row, data, seed=1)) for row in rows]
    assert [one["rejected"] for one in other if one != TIE] != [pair[0][1] for pair in drawn]


@pytest.mark.parametrize("as_json", [False, True])
def test_responses_of_messages(as_json: bool) -> None:
    """Lists of messages, or single ones; perhaps stored as JSON."""
    answer = {"role": "assistant", "content": "yes"}
    responses: Any = [[answer], answer | {"content": "no"}]
    scores: Any = [0, 1]
    if as_json:
        responses, scores = json.dumps(responses), json.dumps(scores)
    row = {"prompt": "p", "responses": responses, "scores": scores}
    assert chosen_and_rejected(row) == [([{**answer, "content": "no"}], [answer])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": None}, "responses is missing"),
        ({"scores": None}, "scores is missing"),
        ({"responses": "no list"}, "responses is neither a list nor JSON of one"),
        (
            {"responses": '[{"role": "assistant", "content": "good", "content": "BAD"}, "b", "c"]'},
            "responses is JSON with a key twice: 'content'",
        ),
        ({"responses": {"a": 1}}, "responses is not a list: dict"),
        ({"scores": [1, 2]}, "responses and scores have different lengths: 3 and 2"),
        ({"responses": ["a"], "scores": [1]}, "responses has fewer than two responses"),
        ({"scores": [1, "2", 3]}, "a value of scores is not a number: str"),
        ({"scores": [1, True, 3]}, "a value of scores is not a number: bool"),
        ({"scores": [1, float("nan"), 3]}, "a value of scores is not a finite number"),
        ({"scores": [1, 10**400, 3]}, "a value of scores is not a finite number"),
        ({"responses": ["a", None, "c"]}, "a response of responses is missing"),
        ({"responses": ["a", 3, "c"]}, "a response of responses is neither text nor a list"),
    ],
)
def test_rows_that_cannot_be_paired(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError) as caught:
        list(pairs_in(ROW | changes, config()))
    assert str(caught.value).startswith(message)


def test_half_a_surrogate_is_no_reason_to_fail() -> None:
    """The pair's own check refuses it."""
    row = ROW | {"responses": ["a", "b", "\ud83d"]}
    assert len(chosen_and_rejected(row, pairing="best_vs_random")) == 1
