"""A key-value cache that branches continue: prefill, repeat, and holes in the mask."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branch import Branch, Trunks
from .model import logits_at, model_device


class Grown(NamedTuple):
    """What is fed after a cache: a branch, with one token of the trunk before it where its first token needs logits."""

    cut: int
    ids: list[int]

    @classmethod
    def of(cls, trunks: Trunks, branch: Branch, *, all_ids: bool = False) -> Grown:
        ids = list(branch.ids if all_ids else branch.ids[:-1])
        if branch.cut and (not ids if all_ids else branch.start == 0):
            return cls(branch.cut - 1, [trunks[branch.trunk][branch.cut - 1], *ids])
        return cls(branch.cut, ids)


def prefill(model: nn.Module, ids: Sequence[int]) -> dict[str, Any]:
    """The cache of one sequence, as an argument of the next forward; empty for no tokens."""
    if not ids:
        return {}
    device = model_device(model)
    _, outputs = logits_at(
        model, torch.zeros(1, dtype=torch.int64, device=device), input_ids=torch.tensor([ids], device=device),
        use_cache=True,
    )  # fmt: skip
    cache = getattr(outputs, "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        raise ValueError(f"engine: {type(model).__name__} returns no cache whose rows can be repeated")
    return {"past_key_values": cache}


def repeat_cache(cache: dict[str, Any], times: int, *, last: bool) -> dict[str, Any]:
    """One row's cache for `times` rows; in place if it is the `last` use of it."""
    if not cache:
        return {}
    one = cache["past_key_values"]
    many = one if last else copy.deepcopy(one)
    many.batch_repeat_interleave(times)
    return {"past_key_values": many}


def holes(
    past: int, cuts: Sequence[int], lengths: Sequence[int], width: int, device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """(mask (R, past + width), positions (R, width)) of rows that see the first `cut` of `past` cached tokens, and
    `lengths` of `width` new ones: the first, or with `left` the last (padding on the left)."""
    cut, length = torch.tensor(cuts, device=device)[:, None], torch.tensor(lengths, device=device)[:, None]
    place = torch.arange(width, device=device)[None] - (width - length if left else 0)
    fresh = (place >= 0) & (place < length)
    mask = torch.cat([torch.arange(past, device=device)[None] < cut, fresh], 1)
    last = max(map(sum, zip(cuts, lengths, strict=True))) - 1  # padding must not reach past the model's positions
    return mask.to(torch.int64), (cut + place.clamp(min=0)).clamp(max=last)
