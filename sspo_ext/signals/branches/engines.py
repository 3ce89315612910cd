# SPDX-License-Identifier: Apache-2.0
"""The three engines; `branch_logps` documents them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import check_choice
from ...hf.wrappers import model_device
from ...layout.tree import TokenTree
from ...tree.inputs import tree_attention
from ...tree.masks import FLEX, tree_mask
from ...tree.tiles import TILED
from .branch import ALL_ENGINES, Branch, BranchLogps, Trunks, by_trunk, in_budget
from .cache import cached_rows
from .model import label_logps, logits_at


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
    check_choice("engine", engine, ALL_ENGINES)
    begin = np.concatenate([[0], np.cumsum([len(b.ids) - b.start for b in branches], dtype=np.int64)])
    device = model_device(model)
    found: list[tuple[np.ndarray, Tensor]] = []  # places in the result, log-probs
    todo = [r for r, b in enumerate(branches) if len(b.ids) > b.start]
    run = {
        "separate": _separate, "cached": _cached, "packed": partial(_packed, fallback=fallback),
        "shared": partial(_shared, fallback=fallback),
    }[engine]  # fmt: skip
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


def _tree(trunks: Trunks, branches: Sequence[Branch], groups: list[list[int]], alike: bool = False) -> TokenTree:
    """The branches of each group as a tree, or of all groups that begin `alike`.

    A branch's last token is only predicted, so it is left out.
    """
    paths, number = [], []
    for g, members in enumerate(groups):
        paths += [[*trunks[branches[r].trunk][: branches[r].cut], *branches[r].ids[:-1]] for r in members]
        number += [g] * len(members)
    return TokenTree.from_sequences(paths, groups=None if alike else number)


def _trees(model: nn.Module, trunks: Trunks, branches: Sequence[Branch], groups: list[list[int]], alike: bool) -> _Part:
    """Run one forward of trees."""
    tree = _tree(trunks, branches, groups, alike)
    owners = [(r, len(branches[r].ids) - branches[r].start) for members in groups for r in members]
    at = torch.cat([path[len(path) - n :] for path, (_, n) in zip(tree.places(), owners, strict=True)])
    labels = [token for r, _ in owners for token in branches[r].ids[branches[r].start :]]
    tree = tree.to(model_device(model))
    inputs = {"attention_mask": tree_mask(model, tree), "position_ids": tree.position_ids}
    logits, _ = logits_at(model, at.to(tree.device), input_ids=tree.input_ids, **inputs)
    return owners, label_logps(logits, labels)


def _packed(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    todo: list[int],
    max_tokens: int,
    *,
    fallback: Callable[[int], str],
    alike: bool = False,
) -> Iterator[_Part]:
    groups: list[list[int]] = []
    beyond: list[int] = []
    for members in by_trunk(branches, todo, max_tokens):
        alone = len(members) == 1 and branches[members[0]].cut + len(branches[members[0]].ids) > max_tokens
        (beyond.extend if alone else groups.append)(members)
    sized = [(_tree(trunks, branches, [members]).num_tokens, members) for members in groups]
    if alike:  # trunks with the same beginning come together
        sized.sort(key=lambda item: list(trunks[branches[item[1][0]].trunk]))
    else:
        sized.sort(key=lambda item: item[0], reverse=True)
    for some in in_budget([size for size, _ in sized], max_tokens):
        yield _trees(model, trunks, branches, [members for _, members in sized[some.start : some.stop]], alike)
    # A path beyond the budget would be alone in its tree. The trunk's cache still shares its context.
    if beyond:
        longest = max(branches[r].cut + len(branches[r].ids) for r in beyond)
        run = _cached if fallback(longest) == "cached" else _separate
        yield from run(model, trunks, branches, beyond, max_tokens)


def _shared(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    todo: list[int],
    max_tokens: int,
    *,
    fallback: Callable[[int], str],
) -> Iterator[_Part]:
    with tree_attention(model) as attention:
        # where attention computes what no token sees, trunks stay in rows of their own
        alike = attention in (FLEX, TILED)
        yield from _packed(model, trunks, branches, todo, max_tokens, fallback=fallback, alike=alike)


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
