"""The tensors that a model reads for a few pairs.

Legend: B pairs of a micro-batch, R responses per pair (2: chosen and rejected, or 1), L length of a
row, N response tokens of a micro-batch.

A pair becomes one row [prompt | chosen | rejected]: the rejected part does not see the chosen one,
and its positions continue the prompt's. If the model's attention does not allow that, or there is
only one response, each response is a row [prompt | response]. Both give the same indices into the
flattened hidden states, so later code does not depend on which layout was used.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madpo_ray.columns import PAIR_ID, PROMPT_IDS, RESPONSE_IDS, TOKEN_COLUMNS
from madpo_ray.data.order import StepPlace

Pair = Mapping[str, Any]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward reads. Responses are numbered 0..B-1 (chosen), then B..2B-1 (rejected)."""

    input_ids: Tensor  # (rows, L)
    position_ids: Tensor  # (rows, L)
    attention_mask: Tensor  # (B, 1, L, L) bool for shared rows, else (R * B, L)
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
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """In memory from which a GPU copies without the host; as it is if there is no GPU."""
        return self._map(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed: dict[str, Any] = {
            field.name: change(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        changed["columns"] = {name: change(value) for name, value in self.columns.items()}
        return dataclasses.replace(self, **changed)

    @property
    def is_shared(self) -> bool:
        """Whether both responses of a pair are in one row."""
        return self.attention_mask.dim() == 4

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.input_ids.numel()


def collate(
    pairs: Sequence[Pair],
    *,
    shared_prefix: bool,
    column_names: Sequence[str] = (),
    responses: Sequence[str] = RESPONSE_IDS,
    place: StepPlace | None = None,
) -> MicroBatch:
    """Tensors of a few pairs; no pairs give a filler of one short row with `valid` 0.

    Each pair holds `prompt_ids`, the ids of the named responses and the named float columns.

    Raises:
        ValueError: a prompt or response has no tokens.
    """
    tokens = (PROMPT_IDS, *responses)
    filler: dict[str, Any] = {name: [0] for name in tokens} | dict.fromkeys(column_names, 0.0)
    rows = list(pairs) or [filler]
    empty = {name for row in rows for name in tokens if len(row[name]) == 0}
    if empty:
        raise ValueError(f"no tokens in {sorted(empty)}: such pairs belong to the rejects")

    # A single response shares its prompt with nothing.
    is_shared = shared_prefix and len(responses) > 1
    layout = _shared_rows(rows) if is_shared else _separate_rows(rows, responses)

    num_prompts = 1 if is_shared else len(responses)
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


def _count_tokens(pairs: Sequence[Pair], responses: Sequence[str], num_prompts: int) -> int:
    prompts = num_prompts * sum(len(pair[PROMPT_IDS]) for pair in pairs)
    return prompts + sum(len(pair[name]) for pair in pairs for name in responses)


def _count_attended(pairs: Sequence[Pair], responses: Sequence[str], num_prompts: int) -> int:
    count = 0
    for pair in pairs:
        prompt = len(pair[PROMPT_IDS])
        count += num_prompts * prompt * (prompt + 1) // 2
        for name in responses:
            length = len(pair[name])
            count += length * (2 * prompt + length + 1) // 2
    return count


class _Span(NamedTuple):
    """A response in the flattened rows."""

    before: int  # position of the prompt's last token
    start: int  # position of the response's first token
    ids: list[int]


def _shared_rows(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """One row [prompt | chosen | rejected] per pair."""
    parts = [[list(pair[name]) for name in TOKEN_COLUMNS] for pair in pairs]
    length = max(sum(map(len, part)) for part in parts)
    input_ids = torch.zeros(len(parts), length, dtype=torch.long)
    position_ids = torch.zeros(len(parts), length, dtype=torch.long)
    segment = torch.full((len(parts), length), -1)  # 0 prompt, 1 chosen, 2 rejected, -1 padding

    chosen_spans = []
    rejected_spans = []
    for i, (prompt, chosen, rejected) in enumerate(parts):
        p, c, r = len(prompt), len(chosen), len(rejected)
        input_ids[i, : p + c + r] = torch.tensor(prompt + chosen + rejected)
        position_ids[i, : p + c] = torch.arange(p + c)
        position_ids[i, p + c : p + c + r] = torch.arange(p, p + r)
        sizes = torch.tensor([p, c, r])
        segment[i, : p + c + r] = torch.repeat_interleave(torch.arange(3), sizes)

        start = i * length
        chosen_spans.append(_Span(start + p - 1, start + p, chosen))
        rejected_spans.append(_Span(start + p - 1, start + p + c, rejected))

    # A token sees the prompt and its own response; padding attends to padding, so that no softmax
    # row is empty (NaN).
    position = torch.arange(length)
    is_causal = position[None, :] <= position[:, None]
    query = segment[:, :, None]
    key = segment[:, None, :]
    is_allowed = is_causal & (((key == 0) & (query >= 0)) | (key == query))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": is_allowed[:, None],
        **_target_indices(chosen_spans + rejected_spans),
    }


def _separate_rows(pairs: Sequence[Pair], responses: Sequence[str]) -> dict[str, Tensor]:
    """One row [prompt | response] per response."""
    texts = [(list(pair[PROMPT_IDS]), list(pair[name])) for name in responses for pair in pairs]
    length = max(len(prompt) + len(response) for prompt, response in texts)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    attention_mask = torch.zeros(len(texts), length, dtype=torch.long)

    # Fill the rows, and remember where each response is.
    spans = []
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        start = i * length + len(prompt)
        spans.append(_Span(start - 1, start, response))

    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(length).expand(len(texts), length).contiguous(),
        "attention_mask": attention_mask,
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
