"""The tensors that a model reads for a few pairs.

Legend: B pairs of a micro-batch, R responses per pair (2: chosen and rejected, or 1), L length of a
row, N response tokens of a micro-batch.

All pairs become one packed row [p1 c1 r1 p2 c2 r2 ...], in which attention keeps the texts apart:
a rejected response does not see the chosen one, and its positions continue the prompt's. If the
model cannot read that, each response is a row [prompt | response], padded. Both give the same
indices into the flattened hidden states, so later code does not depend on which layout was used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from madpo_ray.columns import PAIR_ID, PROMPT_IDS, RESPONSE_IDS
from madpo_ray.data.order import StepPlace

PairRow = Mapping[str, Any]


class Segment(NamedTuple):
    """Tokens of a packed row that see a prefix and, causally, one another.

    A prompt and the first response are one segment, without a prefix; the prompt is the prefix of
    another response.
    """

    prefix_start: int
    prefix_end: int
    start: int
    end: int

    @property
    def prefix(self) -> slice:
        return slice(self.prefix_start, self.prefix_end)

    @property
    def own(self) -> slice:
        return slice(self.start, self.end)

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        """Tokens that its last one sees."""
        return self.prefix_end - self.prefix_start + self.num_tokens


@dataclass(frozen=True)
class PackedRow:
    """Which tokens of a packed row see each other.

    S segments, T tokens, K keys: the tokens that each segment sees, one segment after another.
    P tokens are seen by two segments.
    """

    segments: tuple[Segment, ...]
    position_ids: Tensor  # (1, T) positions in the segment and its prefix
    key_index: Tensor  # (K,) the token of each key
    first_keys: Tensor  # (T,) the first key of each token
    prompt_tokens: Tensor  # (P,) the tokens that have a second key: prompts, with two responses
    second_keys: Tensor  # (P,) the second key of each of them
    query_ends: Tensor  # (S + 1,) int32: 0, and where each segment ends among the tokens
    key_ends: Tensor  # (S + 1,) int32: the same among the keys

    @property
    def max_queries(self) -> int:
        """Tokens of the longest segment."""
        return max(segment.num_tokens for segment in self.segments)

    @property
    def max_keys(self) -> int:
        """Keys of the segment that sees most."""
        return max(segment.num_keys for segment in self.segments)

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "PackedRow":
        """Also called between layers on different GPUs, as for a tensor (accelerate's hooks)."""
        moved = _map_tensors(self, lambda one: one.to(device, non_blocking=non_blocking))
        return cast(PackedRow, moved)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward reads. Responses are numbered 0..B-1 (chosen), then B..2B-1 (rejected)."""

    input_ids: Tensor  # (rows, L)
    packed_row: PackedRow | None  # None for separate rows
    attention_mask: Tensor | None  # (R * B, L) for separate rows
    predictor_index: Tensor  # (N,) into rows * L: the position whose state predicts the token
    target_ids: Tensor  # (N,)
    response_of_target: Tensor  # (N,) in 0..R*B-1
    last_index: Tensor  # (R * B,) into rows * L: each response's last token
    response_lengths: Tensor  # (R * B,) tokens
    valid: Tensor  # (B,) 1 for a pair, 0 for the filler of an empty micro-batch
    columns: dict[str, Tensor]  # name -> (B,) float64, such as margin and ref_chosen_logps
    place: StepPlace
    num_real_tokens: int  # tokens that are read, without padding
    num_attended: int  # pairs of tokens of which one sees the other, itself included
    pair_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "MicroBatch":
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """In memory from which a GPU copies without the host; as it is if there is no GPU."""
        return self.map_tensors(Tensor.pin_memory) if torch.cuda.is_available() else self

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        return cast(MicroBatch, _map_tensors(self, change))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with all tensors in it changed."""
    match value:
        case Tensor():
            return change(value)
        case dict():
            return {name: _map_tensors(part, change) for name, part in value.items()}
        case MicroBatch() | PackedRow():
            return replace(value, **_map_tensors(dict(vars(value)), change))
    return value


def collate(
    pairs: Sequence[PairRow],
    *,
    packed: bool,
    column_names: Sequence[str] = (),
    responses: Sequence[str] = RESPONSE_IDS,
    place: StepPlace | None = None,
) -> MicroBatch:
    """Tensors of a few pairs; no pairs give a filler of one short row with `valid` 0.

    Args:
        pairs: each with `prompt_ids`, the ids of the responses and the named float columns.
        packed: one row for all pairs, each prompt once; else a row per response, padded.
        column_names: what becomes `columns`.
        responses: columns with token ids, one or two.
        place: in the run; by default that of a pair on its own.

    Raises:
        ValueError: a prompt or response has no tokens.
    """
    tokens = (PROMPT_IDS, *responses)
    filler: dict[str, Any] = {name: [0] for name in tokens} | dict.fromkeys(column_names, 0.0)
    rows = list(pairs) or [filler]
    empty = {name for row in rows for name in tokens if len(row[name]) == 0}
    if empty:
        raise ValueError(f"no tokens in {sorted(empty)}: such pairs belong to the rejects")

    layout = _packed_row(rows, responses) if packed else _separate_rows(rows, responses)
    num_prompts = 1 if packed else len(responses)
    return MicroBatch(
        **layout,
        valid=torch.ones(len(pairs)) if pairs else torch.zeros(1),
        columns={
            name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
            for name in column_names
        },
        place=place or StepPlace(),
        num_real_tokens=_count_tokens(pairs, responses, num_prompts),
        num_attended=_count_attended(pairs, responses, num_prompts),
        pair_ids=tuple(row.get(PAIR_ID, "") for row in pairs),
    )


def _count_tokens(pairs: Sequence[PairRow], responses: Sequence[str], num_prompts: int) -> int:
    prompts = num_prompts * sum(len(pair[PROMPT_IDS]) for pair in pairs)
    return prompts + sum(len(pair[name]) for pair in pairs for name in responses)


def _count_attended(pairs: Sequence[PairRow], responses: Sequence[str], num_prompts: int) -> int:
    count = 0
    for pair in pairs:
        prompt = len(pair[PROMPT_IDS])
        count += num_prompts * prompt * (prompt + 1) // 2
        for length in (len(pair[name]) for name in responses):
            count += length * (2 * prompt + length + 1) // 2
    return count


class _Span(NamedTuple):
    """A response in the flattened rows."""

    before: int  # position of the prompt's last token
    start: int  # position of the response's first token
    ids: list[int]


def _packed_row(pairs: Sequence[PairRow], responses: Sequence[str]) -> dict[str, Any]:
    """One row for all pairs."""
    ids: list[int] = []
    positions: list[int] = []
    segments = []
    spans: dict[str, list[_Span]] = {name: [] for name in responses}
    for pair in pairs:
        prompt = list(pair[PROMPT_IDS])
        prompt_start = len(ids)
        prompt_end = prompt_start + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        for name in responses:
            response = list(pair[name])
            start = len(ids)
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            spans[name].append(_Span(prompt_end - 1, start, response))
            if start == prompt_end:  # the first
                segments.append(Segment(prompt_start, prompt_start, prompt_start, len(ids)))
            else:
                segments.append(Segment(prompt_start, prompt_end, start, len(ids)))
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": None,
        "packed_row": _index_keys(segments, positions),
        **_target_indices([span for name in responses for span in spans[name]]),
    }


def _index_keys(segments: Sequence[Segment], positions: list[int]) -> PackedRow:
    num_tokens = segments[-1].end
    parts = []
    for one in segments:
        parts += [np.arange(one.prefix_start, one.prefix_end), np.arange(one.start, one.end)]
    key_index = np.concatenate(parts)

    # With repeated indices, numpy keeps the last assignment.
    first_keys = np.empty(num_tokens, dtype=np.int64)
    last_keys = np.empty(num_tokens, dtype=np.int64)
    numbers = np.arange(len(key_index))
    last_keys[key_index] = numbers
    first_keys[key_index[::-1]] = numbers[::-1]
    prompt_tokens = np.flatnonzero(last_keys != first_keys)
    assert len(key_index) == num_tokens + len(prompt_tokens), "more than two responses"

    query_ends = np.cumsum([0, *(one.num_tokens for one in segments)], dtype=np.int32)
    key_ends = np.cumsum([0, *(one.num_keys for one in segments)], dtype=np.int32)
    return PackedRow(
        segments=tuple(segments),
        position_ids=torch.tensor([positions]),
        key_index=torch.from_numpy(key_index),
        first_keys=torch.from_numpy(first_keys),
        prompt_tokens=torch.from_numpy(prompt_tokens),
        second_keys=torch.from_numpy(last_keys[prompt_tokens]),
        query_ends=torch.from_numpy(query_ends),
        key_ends=torch.from_numpy(key_ends),
    )


def _separate_rows(pairs: Sequence[PairRow], responses: Sequence[str]) -> dict[str, Any]:
    """One row [prompt | response] per response."""
    texts = [(list(pair[PROMPT_IDS]), list(pair[name])) for name in responses for pair in pairs]
    length = max(len(prompt) + len(response) for prompt, response in texts)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    attention_mask = torch.zeros(len(texts), length, dtype=torch.long)

    spans = []
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        start = i * length + len(prompt)
        spans.append(_Span(start - 1, start, response))

    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "packed_row": None,
        **_target_indices(spans),
    }


def _target_indices(spans: Sequence[_Span]) -> dict[str, Tensor]:
    """Indices of every response token, and of each response's last one."""
    predictor: list[int] = []
    target: list[int] = []
    response: list[int] = []
    last: list[int] = []

    # The first token of a response is predicted by the prompt's last.
    for number, span in enumerate(spans):
        end = span.start + len(span.ids)
        predictor += [span.before, *range(span.start, end - 1)]
        target += span.ids
        response += [number] * len(span.ids)
        last.append(end - 1)
    return {
        "predictor_index": torch.tensor(predictor),
        "target_ids": torch.tensor(target),
        "response_of_target": torch.tensor(response),
        "last_index": torch.tensor(last),
        "response_lengths": torch.tensor([len(span.ids) for span in spans]),
    }
