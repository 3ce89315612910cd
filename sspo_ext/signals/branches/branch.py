"""Trunks and branches: the words, their checks, and how they are grouped into forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ENGINES = ("packed", "cached", "separate")  # in the order in which "auto" tries them

SAMPLING_ENGINES = ("cached", "separate")

Trunks = Sequence[Sequence[int]]


class Branch(NamedTuple):
    """Tokens after the first `cut` of a trunk's; the first `start` of them are given, the others are scored."""

    trunk: int
    cut: int
    ids: Sequence[int]
    start: int = 0


class BranchLogps(NamedTuple):
    """Log-probs of the scored tokens, branch after branch in the order that was asked for."""

    tokens: Tensor  # (N,) float32 (float64 for a float64 model), at most 0, no gradient
    offsets: Tensor  # (R + 1,) int64 on the same device: branch r's tokens are [offsets[r], offsets[r + 1])

    def sums(self) -> Tensor:
        """(R,) of each branch; 0 for one without scored tokens."""
        return torch.segment_reduce(self.tokens, "sum", offsets=self.offsets, initial=0)


def by_trunk(branches: Sequence[Branch], todo: Sequence[int], max_tokens: int | None) -> Iterator[list[int]]:
    """Branches of one trunk, in groups that fit into the budget with it where that is possible."""
    trunks: dict[int, list[int]] = {}
    for r in todo:
        trunks.setdefault(branches[r].trunk, []).append(r)
    for members in trunks.values():
        members.sort(key=lambda r: branches[r].cut)
        group: list[int] = []
        used = 0
        for r in members:
            size = len(branches[r].ids)
            if group and max_tokens is not None and branches[r].cut + used + size > max_tokens:
                yield group
                group, used = [], 0
            group.append(r)
            used += size
        yield group


def in_budget(sizes: Sequence[int], max_tokens: int) -> Iterator[range]:
    """Runs of `sizes`, which never increase, such that longest x number is within the budget (or one item)."""
    start = 0
    while start < len(sizes):
        n = max(max_tokens // max(sizes[start], 1), 1)
        yield range(start, min(start + n, len(sizes)))
        start += n


def check_branches(trunks: Trunks, branches: Sequence[Branch], max_tokens: int) -> None:
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens: expected a number of tokens of at least 1, got {max_tokens!r}")
    for r, (trunk, cut, ids, start) in enumerate(branches):
        if not 0 <= trunk < len(trunks) or not 0 <= cut <= len(trunks[trunk]):
            raise ValueError(f"branches: branch {r} leaves trunk {trunk} after {cut} tokens, where there is none")
        if not 0 <= start <= len(ids) or cut + start < 1 and len(ids):
            raise ValueError(f"branches: branch {r} starts with its token {start}, which is not there or comes first")
