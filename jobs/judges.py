"""A judge of the demo's samples that has seen none of its pairs."""

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def sentiment(
    prompts: Sequence[Any], completions: Sequence[list[dict[str, str]]], **_: Any
) -> list[float]:
    """How positive each response is, from -1 to 1, by the lexicon of Hutto and Gilbert (2014)."""
    texts = [messages[-1]["content"] for messages in completions]
    return [analyzer.polarity_scores(text)["compound"] for text in texts]
