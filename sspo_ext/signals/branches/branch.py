# SPDX-License-Identifier: Apache-2.0
"""Trunks and branches: the types, their checks, and how branches are grouped into forwards.

A trunk is a sequence of token ids. A branch leaves it after some of its tokens and goes on with tokens of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ENGINES = ("packed", "cached", "separate")  # in the order in which "auto" tries them

ALL_ENGINES = (*ENGINES, "shared")

SAMPLING_ENGINES = ("cached", "separate")

# What must fit into a model's table of positions, in the words of an error.
TOKENS = "tokens with all that follows them (a probe and its answer, or max_new_tokens)"

Trunks = Sequence[Sequence[int]]


class Branch(NamedTuple):
    """Tokens that follow the first `cut` tokens of a trunk.

    Attributes:
        trunk: index of the trunk.
        cut: how many of the trunk's tokens come before the branch.
        ids: token ids of the branch.
        start: the first `start` tokens of `ids` are only context; the others are scored.

    Examples:
        >>> branch = Branch(trunk=0, cut=2, ids=[7, 8, 9], start=1)  # log p(8 and 9 | trunk[:2], 7)
    """

    trunk: int
    cut: int
    ids: Sequence[int]
    start: int = 0


class BranchLogps(NamedTuple):
    """Log-probs of the scored tokens, one branch after the other in the order of the call.

    Attributes:
        tokens: (N,) float32, or float64 for a float64 model; at most 0, without gradient.
        offsets: (R + 1,) int64 on the same device. The tokens of branch r are `tokens[offsets[r]:offsets[r + 1]]`.
    """

    tokens: Tensor
    offsets: Tensor

    def sums(self) -> Tensor:
        """Return the (R,) sums over each branch; 0 for a branch without scored tokens."""
        return torch.segment_reduce(self.tokens, "sum", offsets=self.offsets, initial=0)


def by_trunk(branches: Sequence[Branch], todo: Sequence[int], max_tokens: int | None) -> Iterator[list[int]]:
    """Group branches of one trunk so that, where possible, the trunk and a group fit into the budget together."""
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
    """Cut `sizes`, which never increase, into runs of one item or with longest x number within the budget."""
    start = 0
    while start < len(sizes):
        n = max(max_tokens // max(sizes[start], 1), 1)
        yield range(start, min(start + n, len(sizes)))
        start += n


def check_branches(trunks: Trunks, branches: Sequence[Branch], max_tokens: int) -> None:
    """Raise ValueError for a budget below 1, and for a branch outside its trunk or without a token before it."""
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens: expected a number of tokens of at least 1, got {max_tokens!r}")
    for r, (trunk, cut, ids, start) in enumerate(branches):
        if not 0 <= trunk < len(trunks) or not 0 <= cut <= len(trunks[trunk]):
            raise ValueError(f"branches: branch {r} leaves trunk {trunk} after {cut} tokens, which it does not have")
        if not 0 <= start <= len(ids) or cut + start < 1 and len(ids):
            raise ValueError(
                f"branches: branch {r} has its first scored token at {start}, which is past its end or has no token "
                "before it"
            )
