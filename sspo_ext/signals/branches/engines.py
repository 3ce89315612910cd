"""Log-probs of continuations that branch off from a sequence: probes after each step, candidates for the next one.

A trunk is a sequence of tokens; a branch leaves it after `cut` of its tokens and goes on with tokens of its own. What
is asked for is log p(branch token | trunk[:cut], the branch so far) of many branches that share most of their context.
Three engines give the same numbers:

    separate   one forward for each branch, without padding, mask or cache: the specification
    packed     one forward for a trunk and all of its branches, as a tree: equal tokens after equal contexts are
               computed once, and a 4-D mask lets each token see the path from the root to itself alone. Paths that are
               longer than a forward's budget are run as by "cached", else as by "separate"
    cached     the trunk is computed once; its branches are rows of a second forward that continue its cache, and
               their mask hides what lies behind their cut

`auto` takes packed, else cached, else separate. What a model supports is told by `support.why_not`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import check_choice
from .branch import ENGINES, Branch, BranchLogps, Trunks, by_trunk, in_budget
from .cache import Grown, holes, prefill, repeat_cache
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
    """`branch_logps` without its checks: no gradient mode, no eval mode, no question whether the model supports it.

    `fallback` names the engine, "cached" or "separate", for paths that do not fit in a packed forward; it is given the
    tokens of the longest one.
    """
    check_choice("engine", engine, ENGINES)
    offsets = np.concatenate([[0], np.cumsum([len(b.ids) - b.start for b in branches], dtype=np.int64)])
    device = model_device(model)
    found: list[tuple[np.ndarray, Tensor]] = []  # places in the result, log-probs
    todo = [r for r, b in enumerate(branches) if len(b.ids) > b.start]
    run = {"separate": _separate, "packed": partial(_packed, fallback=fallback), "cached": _cached}[engine]
    for owners, logps in run(model, trunks, branches, todo, max_tokens):
        places = [np.arange(offsets[r] + j, offsets[r] + j + n) for r, j, n in owners]
        found.append((np.concatenate(places), logps))
    offsets = torch.from_numpy(offsets).to(device)
    if not found:
        return BranchLogps(torch.zeros(0, device=device), offsets)
    order = torch.from_numpy(np.concatenate([places for places, _ in found])).to(device)
    logps = torch.cat([logps for _, logps in found])
    return BranchLogps(torch.empty_like(logps).index_copy_(0, order, logps), offsets)


# (branch, its first scored token here, how many), log-probs of all of them end to end
_Part = tuple[list[tuple[int, int, int]], Tensor]


def _separate(model, trunks: Trunks, branches: Sequence[Branch], todo: list[int], max_tokens: int) -> Iterator[_Part]:
    device = model_device(model)
    for r in todo:
        trunk, cut, ids, start = branches[r]
        tokens = torch.tensor([[*trunks[trunk][:cut], *ids[:-1]]], device=device)
        at = torch.arange(cut + start - 1, cut + len(ids) - 1, device=device)
        logits, _ = logits_at(model, at, input_ids=tokens)
        yield [(r, 0, len(ids) - start)], label_logps(logits, ids[start:])


class Tree:
    """Trunk and branches as one tree of tokens: a token is stored once for all paths that lead to it."""

    def __init__(self, trunk: Sequence[int]):
        self.tokens = list(trunk)
        self.parents = list(range(-1, len(trunk) - 1))
        self.children = {(i - 1, token): i for i, token in enumerate(trunk)}

    def add(self, cut: int, ids: Sequence[int], start: int) -> tuple[list[int], list[int]]:
        """Nodes whose logits predict ids[start:], and these. The last token of a branch is only ever predicted."""
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
        depth: list[int] = []
        for parent in self.parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return depth

    def mask(self) -> np.ndarray:
        """(T, T) bool: which token sees which, the path from the root to it."""
        seen = np.eye(len(self), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                seen[i] |= seen[parent]
        return seen


def _packed(
    model,
    trunks: Trunks,
    branches: Sequence[Branch],
    todo: list[int],
    max_tokens: int,
    *,
    fallback: Callable[[int], str],
) -> Iterator[_Part]:
    rows = []
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
        batch = rows[some.start : some.stop]
        length = len(batch[0][0])
        ids, positions = np.zeros((2, len(batch), length), np.int64)
        # Padding sees itself: a row of a softmax that sees nothing would be NaN.
        mask = np.broadcast_to(np.eye(length, dtype=bool), (len(batch), length, length)).copy()
        at, labels, owners = [], [], []
        for i, (tree, scored) in enumerate(batch):
            n = len(tree)
            ids[i, :n], positions[i, :n] = tree.tokens, tree.positions()
            mask[i, :n, :n] = tree.mask()
            for r, nodes, tokens in scored:
                at += [i * length + node for node in nodes]
                labels += tokens
                owners.append((r, 0, len(tokens)))
        device = model_device(model)
        ids, positions, mask, at = (torch.from_numpy(np.asarray(x)).to(device) for x in (ids, positions, mask, at))
        inputs = {"attention_mask": four_d_mask(model, mask, positions), "position_ids": positions}
        logits, _ = logits_at(model, at, input_ids=ids, **inputs)
        yield owners, label_logps(logits, labels)
    # A path beyond the budget shares its context with no other: the trunk's cache does, and a mask would only cost.
    if beyond:
        longest = max(branches[r].cut + len(branches[r].ids) for r in beyond)
        run = _cached if fallback(longest) == "cached" else _separate
        yield from run(model, trunks, branches, beyond, max_tokens)


def _cached(model, trunks: Trunks, branches: Sequence[Branch], todo: list[int], max_tokens: int) -> Iterator[_Part]:
    device = model_device(model)
    for members in by_trunk(branches, todo, None):
        # Where a branch's first token is scored, the trunk's last is fed again: all logits come from one forward.
        grown = {r: Grown.of(trunks, branches[r]) for r in members}
        prefix = trunks[branches[members[0]].trunk][: max(g.cut for g in grown.values())]
        cache = prefill(model, prefix)
        members.sort(key=lambda r: len(grown[r].ids), reverse=True)
        sizes = [len(prefix) + len(grown[r].ids) for r in members]
        chunks = list(in_budget(sizes, max_tokens))
        for c, some in enumerate(chunks):
            rows = [grown[r] for r in members[some.start : some.stop]]
            width = len(rows[0].ids)
            ids = torch.tensor([[*g.ids, *[0] * (width - len(g.ids))] for g in rows], device=device)
            spread = repeat_cache(cache, len(rows), last=c == len(chunks) - 1)
            at, labels, owners = [], [], []
            for i, (r, g) in enumerate(zip(members[some.start : some.stop], rows, strict=True)):
                tokens = branches[r].ids[branches[r].start :]
                at += [i * width + len(g.ids) - len(tokens) + j for j in range(len(tokens))]
                labels += tokens
                owners.append((r, 0, len(tokens)))
            mask, positions = holes(len(prefix), [g.cut for g in rows], [len(g.ids) for g in rows], width, device)
            inputs = {"attention_mask": mask, "position_ids": positions, **spread}
            logits, _ = logits_at(model, torch.tensor(at, device=device), input_ids=ids, use_cache=True, **inputs)
            yield owners, label_logps(logits, labels)
