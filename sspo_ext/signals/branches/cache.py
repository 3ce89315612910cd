# SPDX-License-Identifier: Apache-2.0
"""Branches as rows of one forward that continues the key-value cache of their trunk."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...hf.cache import cache_input, cache_of, has_virtual_tokens
from ...hf.wrappers import model_device
from .branch import Branch, Trunks, by_trunk, in_budget
from .model import logits_at


class Grown(NamedTuple):
    """What is fed after a cache: a branch, after the trunk's last token where the branch's first needs its logits."""

    cut: int
    ids: list[int]

    @classmethod
    def of(cls, trunks: Trunks, branch: Branch, *, all_ids: bool = False) -> Grown:
        """Make it from a branch. Without `all_ids` the branch's last token, which is only predicted, is left out."""
        ids = list(branch.ids if all_ids else branch.ids[:-1])
        if branch.cut and (not ids if all_ids else branch.start == 0):
            return cls(branch.cut - 1, [trunks[branch.trunk][branch.cut - 1], *ids])
        return cls(branch.cut, ids)


class CachedRows(NamedTuple):
    """One forward's rows: branches of one trunk after the trunk's cache."""

    members: list[int]  # (R,) indices of the branches
    rows: list[Grown]  # (R,)
    ids: Tensor  # (R, width) int64, padded with 0
    inputs: dict[str, Any]  # attention_mask, position_ids and the cache of the forward


def cached_rows(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    todo: Sequence[int],
    max_tokens: int,
    *,
    to_sample: tuple[int, int] | None = None,
) -> Iterator[CachedRows]:
    """Run each trunk once, and yield its branches in groups whose caches fit into the budget.

    `to_sample` is (samples of each branch, new tokens of each sample), for branches that are continued: then all of
    their tokens are fed, padded on the left. Otherwise they are padded on the right.
    """
    device = model_device(model)
    times, more = to_sample or (1, 0)
    left = to_sample is not None
    for members in by_trunk(branches, todo, None):
        # Where a branch's first token is scored, the trunk's last is fed again: all logits come from one forward.
        grown = {r: Grown.of(trunks, branches[r], all_ids=left) for r in members}
        prefix = trunks[branches[members[0]].trunk][: max(g.cut for g in grown.values())]
        cache = _prefill(model, prefix)
        members.sort(key=lambda r: len(grown[r].ids), reverse=True)
        sizes = [times * (len(prefix) + len(grown[r].ids) + more) for r in members]
        chunks = list(in_budget(sizes, max_tokens))
        for c, some in enumerate(chunks):
            chosen = members[some.start : some.stop]
            rows = [grown[r] for r in chosen]
            width = len(rows[0].ids)
            padding = [[0] * (width - len(g.ids)) for g in rows]
            padded = [[*pad, *g.ids] if left else [*g.ids, *pad] for g, pad in zip(rows, padding, strict=True)]
            ids = torch.tensor(padded, device=device)
            lengths = [len(g.ids) for g in rows]
            mask, positions = _holes(len(prefix), [g.cut for g in rows], lengths, width, device, left=left)
            inputs = {"attention_mask": mask, "position_ids": positions}
            if cache is not None:
                inputs |= cache_input(model, _repeat(cache, len(rows), last=c == len(chunks) - 1))
            yield CachedRows(chosen, rows, ids, inputs)


def _prefill(model: nn.Module, ids: Sequence[int]) -> Any:
    """Run one sequence and return its cache; None for no tokens."""
    if not ids:
        return None
    device = model_device(model)
    _, outputs = logits_at(
        model, torch.zeros(1, dtype=torch.int64, device=device), input_ids=torch.tensor([ids], device=device),
        use_cache=True,
    )  # fmt: skip
    cache = None if has_virtual_tokens(model) else cache_of(outputs)
    if not hasattr(cache, "batch_repeat_interleave"):
        raise ValueError(f"engine: {type(model).__name__} returns no cache whose rows can be repeated")
    return cache


def _repeat(one: Any, times: int, *, last: bool) -> Any:
    """Repeat a cache of one row `times` times; in place if this is its `last` use."""
    many = one if last else copy.deepcopy(one)
    many.batch_repeat_interleave(times)
    return many


def _holes(
    past: int, cuts: Sequence[int], lengths: Sequence[int], width: int, device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Return (mask (R, past + width), positions (R, width)) of rows after a cache of `past` tokens.

    Row r sees the first `cuts[r]` cached tokens and `lengths[r]` of the `width` new ones: the first of them, or with
    `left` the last.
    """
    cut, length = torch.tensor(cuts, device=device)[:, None], torch.tensor(lengths, device=device)[:, None]
    place = torch.arange(width, device=device)[None] - (width - length if left else 0)
    fresh = (place >= 0) & (place < length)
    mask = torch.cat([torch.arange(past, device=device)[None] < cut, fresh], 1)
    last = max(map(sum, zip(cuts, lengths, strict=True))) - 1  # padding must not reach past the model's positions
    return mask.to(torch.int64), (cut + place.clamp(min=0)).clamp(max=last)
