"""Several scored responses to one prompt become pairs, the better response chosen."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from madpo_ray.config import DataConfig
from madpo_ray.data.files import Row
from madpo_ray.data.messages import BadRowError, Content, as_text, read_content
from madpo_ray.data.strict_json import parse_json

# Scores of a pair's responses, as columns that data.keep_columns may name.
CHOSEN_SCORE = "score_chosen"
REJECTED_SCORE = "score_rejected"
SCORE_COLUMNS = (CHOSEN_SCORE, REJECTED_SCORE)
# What is instead of a pair of responses with one score.
TIE = "both responses have the same score"

Scored = tuple[float, Content]


def pairs_in(row: Row, data: DataConfig, seed: int = 0) -> Iterator[Row | str]:
    """The pairs of a row, as rows with a chosen and a rejected column, or TIE instead of one.

    A row of data that has no data.responses_column is a pair itself.

    Args:
        seed: of the responses that data.pairing: best_vs_random draws.

    Raises:
        BadRowError: responses or scores are missing, or not as many of one as of the other.
    """
    if data.responses_column is None or data.scores_column is None:
        yield row
        return

    try:
        scored = _read_scored(row, data.responses_column, data.scores_column)
    except RecursionError:
        raise BadRowError("values are nested too deeply") from None
    rest = {
        name: value
        for name, value in row.items()
        if name not in (data.responses_column, data.scores_column)
    }
    for (score, chosen), (other_score, rejected) in _pairings(scored, data, seed):
        if score == other_score:
            yield TIE
            continue
        yield {
            **rest,
            data.chosen_column: chosen,
            data.rejected_column: rejected,
            CHOSEN_SCORE: score,
            REJECTED_SCORE: other_score,
        }


def _pairings(scored: list[Scored], data: DataConfig, seed: int) -> Iterator[tuple[Scored, Scored]]:
    """Pairs of responses, the better one first."""
    ranked = sorted(scored, key=lambda one: -one[0])  # equal ones stay in their order
    match data.pairing:
        case "all":
            yield from itertools.combinations(ranked, 2)
        case "best_vs_worst":
            yield ranked[0], ranked[-1]
        case "best_vs_random":
            texts = "\n".join(as_text(response) for _, response in ranked)
            drawn = random.Random(f"{seed}:{texts}".encode("utf-8", "surrogatepass"))
            yield ranked[0], drawn.choice(ranked[1:])


def _read_scored(row: Mapping[str, Any], responses_name: str, scores_name: str) -> list[Scored]:
    responses = _read_list(row, responses_name)
    scores = _read_list(row, scores_name)
    if len(responses) != len(scores):
        raise BadRowError(
            f"{responses_name} and {scores_name} have different lengths",
            f"{len(responses)} and {len(scores)}",
        )
    if len(responses) < 2:
        raise BadRowError(f"{responses_name} has fewer than two responses")
    return [
        (_read_score(score, scores_name), _read_response(response, responses_name))
        for score, response in zip(scores, responses, strict=True)
    ]


def _read_list(row: Mapping[str, Any], name: str) -> list[Any]:
    """A list, perhaps stored as JSON."""
    value = row.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if isinstance(value, str):
        try:
            value, repeated = parse_json(value)
        except (ValueError, RecursionError):
            raise BadRowError(f"{name} is neither a list nor JSON of one") from None
        if repeated is not None:
            raise BadRowError(f"{name} is JSON with a key twice", repr(repeated))
    if not isinstance(value, list):
        raise BadRowError(f"{name} is not a list", type(value).__name__)
    return value


def _read_score(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"a value of {name} is not a number", type(value).__name__)
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise BadRowError(f"a value of {name} is not a finite number")
    return score


def _read_response(value: Any, name: str) -> Content:
    """A text, or a list of messages; a single message is a list of one."""
    if isinstance(value, Mapping):
        value = [value]
    what = f"a response of {name}"
    return read_content({what: value}, what)
