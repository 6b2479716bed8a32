"""Identity and split of a pair: content hash, group, train / validation / test, repeats."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from madpo_ray import columns
from madpo_ray.config import DataConfig
from madpo_ray.data.formats import Pair
from madpo_ray.errors import UserError


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


def swapped_hash(pair: Pair) -> str:
    """The content hash of the pair with both responses swapped."""
    return content_hash(dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen))


def group_hash(group: str) -> int:
    """A number below 2^56 that decides a group's fold."""
    return int.from_bytes(hashlib.sha256(f"fold:{group}".encode()).digest()[:7])


def require_full_folds(hashes: np.ndarray, num_folds: int) -> None:
    """Raises UserError if a fold of groups with these hashes, (pairs,), has no pair."""
    counts = np.bincount(folds_of(hashes, num_folds), minlength=num_folds)
    if not counts.all():
        raise UserError(
            f"reward.folds: {num_folds} folds of {len(hashes)} training pairs leave fold "
            f"{counts.argmin()} without a pair: lower it, or set data.group_column to a column "
            "with more values"
        )


RowKey = tuple[int, int, int]  # file number, row, pair in the row


class Found(NamedTuple):
    """A pair that was read: where, and what it says."""

    place: RowKey
    content: str  # its content hash
    swapped: str  # that of the pair with both responses swapped
    split: str


class Repeats(NamedTuple):
    """What becomes of pairs that occur more than once, or both ways round.

    Attributes:
        occurrences: how often the same content was there before, by place, for pairs that repeat.
        left_out: places of pairs that are left out.
        num_duplicates: pairs that were there before.
        num_contradictions: pairs that also occur with chosen and rejected swapped.
    """

    occurrences: dict[RowKey, int]
    left_out: set[RowKey]
    num_duplicates: int
    num_contradictions: int


def find_repeats(read: Callable[[], Iterable[Found]], data: DataConfig) -> Repeats:
    """Decides about duplicates and contradictions, as the config says.

    Args:
        read: gives all pairs in order; it is called twice.
    """
    counts = Counter(pair.content for pair in read())
    seen: Counter[str] = Counter()
    occurrences = {}
    left_out = set()
    num_contradictions = 0

    for pair in read():
        before = seen[pair.content]
        seen[pair.content] += 1
        num_against = counts.get(pair.swapped, 0)
        num_contradictions += num_against > 0
        is_outvoted = num_against >= counts[pair.content]
        if (
            (before and data.duplicates == "drop")
            or (num_against and data.contradictions == "drop")
            or (num_against and data.contradictions == "majority" and is_outvoted)
        ):
            left_out.add(pair.place)
        elif before:
            occurrences[pair.place] = before

    num_duplicates = counts.total() - len(counts)
    return Repeats(occurrences, left_out, num_duplicates, num_contradictions)


def require_order(found: Iterable[Found], pair_ids: Sequence[str], repeats: Repeats) -> None:
    """Raises RuntimeError if pairs were not read, or not written, in the order of the files.

    Args:
        found: the pairs as they were read.
        pair_ids: of those that were written: a content hash, a hyphen and a number.
    """
    last: tuple[int, ...] = ()
    kept = []
    for one in found:
        if one.place <= last:
            raise RuntimeError(f"the row {one.place} (file, row, pair) came after {last}")
        last = one.place
        if one.place not in repeats.left_out:
            kept.append(one.content)
    if [pair_id.rpartition("-")[0] for pair_id in pair_ids] != kept:
        raise RuntimeError("the pairs were written in another order than they were read in")


def folds_of(group_hashes: np.ndarray, num_folds: int) -> np.ndarray:
    """The fold of each pair, (pairs,), from its group's hash."""
    folds: np.ndarray = group_hashes % num_folds
    return folds
