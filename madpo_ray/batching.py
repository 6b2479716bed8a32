"""The rows that a model reads.

Legend: B pairs of a micro-batch, L length of a row, N response tokens of a micro-batch (chosen and rejected together).

A pair becomes one row [prompt | chosen | rejected]: the rejected part does not see the chosen one, and its positions
continue the prompt's. Where a model's attention does not allow that, two rows [prompt | chosen] and [prompt |
rejected]. Both give the same indices into the flattened hidden states, so nothing behind this file knows which it
was.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madpo_ray.plan import TOKEN_COLUMNS


@dataclass(frozen=True)
class MicroBatch:
    """What one forward reads. Responses are numbered 0..B-1 (chosen) and B..2B-1 (rejected).

    Where only chosen responses are read (sft), there are B of them instead of 2B everywhere.
    """

    input_ids: Tensor  # (rows, L)
    position_ids: Tensor  # (rows, L)
    attention_mask: Tensor  # (B, 1, L, L) bool for shared rows, (2B, L) for unshared ones
    predictor_index: Tensor  # (N,) into the flattened (rows * L): the position whose hidden state predicts the token
    target_ids: Tensor  # (N,)
    response_of_target: Tensor  # (N,) in 0..2B-1
    last_index: Tensor  # (2B,) into the flattened (rows * L): each response's last token
    response_lengths: Tensor  # (2B,) tokens
    valid: Tensor  # (B,) 1 for a pair, 0 for the filler of an empty micro-batch
    columns: dict[str, Tensor]  # name -> (B,) float64, such as margin and ref_chosen_logps
    num_real_tokens: int = 0  # without padding
    num_attended: int = 0  # pairs of tokens of which one sees the other, itself included
    pair_ids: tuple[str, ...] = ()
    pairs_in_step: int = 1  # pairs of the optimizer step, over all ranks and micro-batches
    response_tokens_in_step: int = 1  # the same for response tokens
    step: int = 0
    last_of_step: bool = True

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return dataclasses.replace(self, **moved, columns=columns)

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return self.input_ids.numel()


def collate(
    rows: Sequence[dict[str, Any]],
    *,
    shared_prefix: bool,
    column_names: Sequence[str] = (),
    responses: Sequence[str] = TOKEN_COLUMNS[1:],
) -> MicroBatch:
    """Tensors of a few pairs; an empty sequence gives a filler of one short row with `valid` 0.

    Each row holds `prompt_ids`, the ids of the named responses (`chosen_ids`, `rejected_ids`) and the named float
    columns. A single response shares its prompt with nothing.

    Raises:
        ValueError: a prompt or response has no tokens.
    """
    valid = torch.ones(len(rows)) if rows else torch.zeros(1)
    tokens = (TOKEN_COLUMNS[0], *responses)
    filler = {name: [0] for name in tokens} | dict.fromkeys(column_names, 0.0)
    pairs = list(rows) or [filler]
    empty = [name for row in pairs for name in tokens if len(row[name]) == 0]
    if empty:
        raise ValueError(f"no tokens in {sorted(set(empty))}: such pairs belong to the rejects")
    shared = shared_prefix and len(responses) > 1
    layout = _shared_rows(pairs) if shared else _unshared_rows(pairs, responses)
    return MicroBatch(
        **layout,  # type: ignore[arg-type]
        valid=valid,
        columns={name: torch.tensor([float(row[name]) for row in pairs], dtype=torch.float64) for name in column_names},
        num_real_tokens=_real_tokens(rows, responses, prompts=1 if shared else len(responses)),
        num_attended=_attended(rows, responses, prompts=1 if shared else len(responses)),
        pair_ids=tuple(row.get("pair_id", "") for row in rows),
        pairs_in_step=max(len(rows), 1),
        response_tokens_in_step=max(sum(len(row[name]) for row in rows for name in responses), 1),
    )


def _real_tokens(rows: Sequence[dict[str, Any]], responses: Sequence[str], *, prompts: int) -> int:
    read = prompts * sum(len(row["prompt_ids"]) for row in rows)
    return read + sum(len(row[name]) for row in rows for name in responses)


def _attended(rows: Sequence[dict[str, Any]], responses: Sequence[str], *, prompts: int) -> int:
    count = 0
    for row in rows:
        prompt = len(row["prompt_ids"])
        count += prompts * prompt * (prompt + 1) // 2
        count += sum(len(row[name]) * (2 * prompt + len(row[name]) + 1) // 2 for name in responses)
    return count


def _shared_rows(pairs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    parts = [[list(row[name]) for name in TOKEN_COLUMNS] for row in pairs]
    length = max(sum(map(len, part)) for part in parts)
    size = len(parts)
    input_ids = torch.zeros(size, length, dtype=torch.long)
    position_ids = torch.zeros(size, length, dtype=torch.long)
    segment = torch.full((size, length), -1)  # 0 prompt, 1 chosen, 2 rejected, -1 padding
    spans = []
    for i, (prompt, chosen, rejected) in enumerate(parts):
        p, c, r = len(prompt), len(chosen), len(rejected)
        input_ids[i, : p + c + r] = torch.tensor(prompt + chosen + rejected)
        position_ids[i, : p + c] = torch.arange(p + c)
        position_ids[i, p + c : p + c + r] = torch.arange(p, p + r)
        segment[i, : p + c + r] = torch.repeat_interleave(torch.arange(3), torch.tensor([p, c, r]))
        spans.append((i * length + p - 1, i * length + p, c, chosen, i * length + p + c, r, rejected))
    position = torch.arange(length)
    causal = position[None, :] <= position[:, None]
    query, key = segment[:, :, None], segment[:, None, :]
    allowed = causal & (((key == 0) & (query >= 0)) | (key == query))  # a padded query sees padding, never nothing
    chosen_spans = [(before, start, ids) for before, start, _, ids, *_ in spans]
    rejected_spans = [(before, start, ids) for before, _, _, _, start, _, ids in spans]
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": allowed[:, None],
        **_targets(chosen_spans + rejected_spans),
    }


def _unshared_rows(pairs: Sequence[dict[str, Any]], responses: Sequence[str]) -> dict[str, Tensor]:
    texts = [(list(row["prompt_ids"]), list(row[name])) for name in responses for row in pairs]
    length = max(len(prompt) + len(response) for prompt, response in texts)
    input_ids = torch.zeros(len(texts), length, dtype=torch.long)
    attention_mask = torch.zeros(len(texts), length, dtype=torch.long)
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
    spans = [
        (i * length + len(prompt) - 1, i * length + len(prompt), response) for i, (prompt, response) in enumerate(texts)
    ]
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(length).expand(len(texts), length).contiguous(),
        "attention_mask": attention_mask,
        **_targets(spans),
    }


def _targets(spans: Sequence[tuple[int, int, list[int]]]) -> dict[str, Tensor]:
    """Indices of every response token, from (position before it, position of its first token, its tokens)."""
    predictor, target, response, last = [], [], [], []
    for number, (before, start, ids) in enumerate(spans):
        predictor += [before, *range(start, start + len(ids) - 1)]
        target += ids
        response += [number] * len(ids)
        last.append(start + len(ids) - 1)
    return {
        "predictor_index": torch.tensor(predictor),
        "target_ids": torch.tensor(target),
        "response_of_target": torch.tensor(response),
        "last_index": torch.tensor(last),
        "response_lengths": torch.tensor([len(ids) for _, _, ids in spans]),
    }
