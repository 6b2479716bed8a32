"""Identity and split of a pair: content hash, group, train / validation / test."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

from madpo_ray import columns
from madpo_ray.config import DataConfig
from madpo_ray.data.formats import Pair


def content_hash(pair: Pair) -> str:
    """The first 16 hex digits of the SHA-256 of a pair's texts."""
    content = [pair.prompt, pair.chosen, pair.rejected]
    if pair.tools is not None or pair.template_options is not None:
        content += [pair.tools, pair.template_options]  # type: ignore[list-item]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_group(pair: Pair) -> str:
    """The prompt, as text: pairs with one prompt stay in one split."""
    return json.dumps(pair.prompt, sort_keys=True, default=str)


def split_of(group: str, data: DataConfig, seed: int) -> str:
    """The split of a group, by hash: it does not depend on which other groups there are."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < data.test_fraction:
        return columns.TEST
    if share < data.test_fraction + data.validation_fraction:
        return columns.VALIDATION
    return columns.TRAIN


Place = tuple[int, int]  # file number, row


def count_repeats(hashes: Iterable[tuple[str, Place]]) -> dict[Place, int]:
    """How often the same content appeared before, by place, for pairs that repeat."""
    seen: Counter[str] = Counter()
    repeats = {}
    for digest, place in hashes:
        if seen[digest]:
            repeats[place] = seen[digest]
        seen[digest] += 1
    return repeats
