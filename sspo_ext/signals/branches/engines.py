# SPDX-License-Identifier: Apache-2.0
"""The three engines; `branch_logps` documents them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import check_choice
from .branch import ENGINES, Branch, BranchLogps, Trunks, by_trunk, in_budget
from .cache import cached_rows
from .masks import four_d_mask
from .model import label_logps, logits_at, model_device


def run_engine(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    engine: str,
    max_tokens: int,
    *,
    fallback: Callable[[int], str] = lambda longest: "separate",
) -> BranchLogps:
    """Run one engine. The caller sets eval mode and no_grad, and knows that the model supports the engine.

    `fallback` names the engine, "cached" or "separate", for paths that do not fit in a packed forward. Its argument is
    the number of tokens of the longest one.
    """
    check_choice("engine", engine, ENGINES)
    begin = np.concatenate([[0], np.cumsum([len(b.ids) - b.start for b in branches], dtype=np.int64)])
    device = model_device(model)
    found: list[tuple[np.ndarray, Tensor]] = []  # places in the result, log-probs
    todo = [r for r, b in enumerate(branches) if len(b.ids) > b.start]
    run = {"separate": _separate, "packed": partial(_packed, fallback=fallback), "cached": _cached}[engine]
    for owners, logps in run(model, trunks, branches, todo, max_tokens):
        places = [begin[r] + np.arange(n) for r, n in owners]
        found.append((np.concatenate(places), logps))
    offsets = torch.from_numpy(begin).to(device)
    if not found:
        return BranchLogps(torch.zeros(0, device=device), offsets)
    order = torch.from_numpy(np.concatenate([places for places, _ in found])).to(device)
    logps = torch.cat([logps for _, logps in found])
    return BranchLogps(torch.empty_like(logps).index_copy_(0, order, logps), offsets)


# [(branch, number of its scored tokens)], and the log-probs of all of them.
_Part = tuple[list[tuple[int, int]], Tensor]


def _separate(
    model: nn.Module, trunks: Trunks, branches: Sequence[Branch], todo: list[int], max_tokens: int
) -> Iterator[_Part]:
    device = model_device(model)
    for r in todo:
        trunk, cut, ids, start = branches[r]
        tokens = torch.tensor([[*trunks[trunk][:cut], *ids[:-1]]], device=device)
        at = torch.arange(cut + start - 1, cut + len(ids) - 1, device=device)
        logits, _ = logits_at(model, at, input_ids=tokens)
        yield [(r, len(ids) - start)], label_logps(logits, ids[start:])


class Tree:
    """A trunk and branches as one tree of tokens: a token is stored once for all paths that share it."""

    def __init__(self, trunk: Sequence[int]):
        self.tokens = list(trunk)
        self.parents = list(range(-1, len(trunk) - 1))
        self.children = {(i - 1, token): i for i, token in enumerate(trunk)}

    def add(self, cut: int, ids: Sequence[int], start: int) -> tuple[list[int], list[int]]:
        """Add a branch; return (the nodes whose logits predict ids[start:], ids[start:]).

        The last token of a branch is only predicted, so it becomes no node.
        """
        node, nodes = cut - 1, []
        for j, token in enumerate(ids):
            if j >= start:
                nodes.append(node)
            if j == len(ids) - 1:
                break
            child = self.children.get((node, token))
            if child is None:
                child = self.children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = child
        return nodes, list(ids[start:])

    def __len__(self) -> int:
        return len(self.tokens)

    def positions(self) -> list[int]:
        """Return the position of each token: its depth in the tree."""
        depth: list[int] = []
        for parent in self.parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return depth

    def mask(self) -> np.ndarray:
        """Return the (T, T) bool mask: each token sees the path from the root to itself."""
        seen = np.eye(len(self), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return seen


# A tree, and [(branch, its nodes, its scored tokens)].
_Row = tuple[Tree, list[tuple[int, list[int], list[int]]]]


def _trees(model: nn.Module, batch: list[_Row]) -> _Part:
    """Run one forward of trees, the longest first."""
    length = len(batch[0][0])
    ids, positions = np.zeros((2, len(batch), length), np.int64)
    # Padding sees itself: a softmax over nothing would be NaN.
    mask = np.broadcast_to(np.eye(length, dtype=bool), (len(batch), length, length)).copy()
    at, labels, owners = [], [], []
    for i, (tree, scored) in enumerate(batch):
        n = len(tree)
        ids[i, :n], positions[i, :n] = tree.tokens, tree.positions()
        mask[i, :n, :n] = tree.mask()
        for r, nodes, tokens in scored:
            at += [i * length + node for node in nodes]
            labels += tokens
            owners.append((r, len(tokens)))
    device = model_device(model)
    ids, positions, mask, at = (torch.from_numpy(np.asarray(x)).to(device) for x in (ids, positions, mask, at))
    inputs = {"attention_mask": four_d_mask(model, mask, positions), "position_ids": positions}
    logits, _ = logits_at(model, at, input_ids=ids, **inputs)
    return owners, label_logps(logits, labels)


def _packed(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    todo: list[int],
    max_tokens: int,
    *,
    fallback: Callable[[int], str],
) -> Iterator[_Part]:
    rows: list[_Row] = []
    beyond: list[int] = []
    for members in by_trunk(branches, todo, max_tokens):
        if len(members) == 1 and branches[members[0]].cut + len(branches[members[0]].ids) > max_tokens:
            beyond += members
            continue
        tree = Tree(trunks[branches[members[0]].trunk][: max(branches[r].cut for r in members)])
        scored = [(r, *tree.add(*branches[r][1:])) for r in members]
        rows.append((tree, scored))
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    for some in in_budget([len(tree) for tree, _ in rows], max_tokens):
        yield _trees(model, rows[some.start : some.stop])
    # A path beyond the budget would be alone in its tree. The trunk's cache still shares its context.
    if beyond:
        longest = max(branches[r].cut + len(branches[r].ids) for r in beyond)
        run = _cached if fallback(longest) == "cached" else _separate
        yield from run(model, trunks, branches, beyond, max_tokens)


def _cached(
    model: nn.Module, trunks: Trunks, branches: Sequence[Branch], todo: list[int], max_tokens: int
) -> Iterator[_Part]:
    for part in cached_rows(model, trunks, branches, todo, max_tokens):
        width = part.ids.shape[1]
        at, labels, owners = [], [], []
        for i, (r, g) in enumerate(zip(part.members, part.rows, strict=True)):
            tokens = branches[r].ids[branches[r].start :]
            at += [i * width + len(g.ids) - len(tokens) + j for j in range(len(tokens))]
            labels += tokens
            owners.append((r, len(tokens)))
        positions = torch.tensor(at, device=part.ids.device)
        logits, _ = logits_at(model, positions, input_ids=part.ids, use_cache=True, **part.inputs)
        yield owners, label_logps(logits, labels)
