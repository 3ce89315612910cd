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

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import check_choice
from ..hf import UnsupportedHead, eval_mode, forward_logits_at, unwrap

ENGINES = ("packed", "cached", "separate")  # in the order in which "auto" tries them
SAMPLING_ENGINES = ("cached", "separate")
_ROWS = 1024  # of logits that are brought to float32 at a time

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


def branch_logps(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    *,
    engine: str = "auto",
    max_tokens: int = 4096,
) -> BranchLogps:
    """Log-prob of every scored token of every branch, without gradient and with the model in eval mode.

    Args:
        model: any Hugging Face causal LM, wrapped or not.
        trunks: lists of token ids.
        branches: any number of each trunk, in any order.
        engine: "separate", "packed", "cached", or "auto"; the module's docstring tells them apart.
        max_tokens: budget of one forward, in tokens with padding (a forward holds one trunk and one branch at least).

    Raises ValueError for a branch whose first scored token has nothing before it, and for an engine that the model does
    not support, with the reason.
    """
    check_branches(trunks, branches, max_tokens)
    from .support import check_positions, choose_engine

    longest = max((b.cut + len(b.ids) for b in branches), default=0)
    check_positions(model, longest - 1)  # the last token is only ever predicted
    with torch.no_grad(), eval_mode(model):
        engine = choose_engine(model, engine, longest)
        return run_engine(model, trunks, branches, engine, max_tokens)


def run_engine(
    model: nn.Module, trunks: Trunks, branches: Sequence[Branch], engine: str, max_tokens: int
) -> BranchLogps:
    """`branch_logps` without its checks: no gradient mode, no eval mode, no question whether the model supports it."""
    check_choice("engine", engine, ENGINES)
    offsets = np.concatenate([[0], np.cumsum([len(b.ids) - b.start for b in branches], dtype=np.int64)])
    device = model_device(model)
    found: list[tuple[np.ndarray, Tensor]] = []  # places in the result, log-probs
    todo = [r for r, b in enumerate(branches) if len(b.ids) > b.start]
    run = {"separate": _separate, "packed": _packed, "cached": _cached}[engine]
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


def _packed(model, trunks: Trunks, branches: Sequence[Branch], todo: list[int], max_tokens: int) -> Iterator[_Part]:
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
        from .support import four_d_mask

        inputs = {"attention_mask": four_d_mask(model, mask, positions), "position_ids": positions}
        logits, _ = logits_at(model, at, input_ids=ids, **inputs)
        yield owners, label_logps(logits, labels)
    # A path beyond the budget shares its context with no other: the trunk's cache does, and a mask would only cost.
    if beyond:
        from .support import why_not

        longest = max(branches[r].cut + len(branches[r].ids) for r in beyond)
        run = _separate if why_not(model, "cached", longest) else _cached
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


def logits_at(model: nn.Module, positions: Tensor, *, use_cache: bool = False, **inputs: Any) -> tuple[Tensor, Any]:
    """((N, V) logits at flattened positions, the model's outputs). The vocabulary projection is computed for them alone
    where the model has a head that can be hooked; else by logits_to_keep for the columns they are in; else whole."""
    if getattr(getattr(unwrap(model), "config", None), "output_router_logits", False):
        inputs["output_router_logits"] = False  # a balance loss, which is of no use here, fails on masks of our own
    try:
        return forward_logits_at(model, positions, use_cache=use_cache, **inputs)
    except UnsupportedHead:
        pass
    if takes(model, "use_cache"):
        inputs["use_cache"] = use_cache
    width = inputs["input_ids"].shape[1]
    # counted from the right, since virtual tokens of PEFT's prompts stand before the text
    row, column = positions // width, positions % width - width
    if takes(model, "logits_to_keep"):
        kept, column = column.unique(return_inverse=True)
        inputs["logits_to_keep"] = kept
    outputs = model(**inputs)
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits[row, column], outputs


def label_logps(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """(N,) log_softmax(logits)[label] in float32 at least, a block of rows at a time."""
    target = torch.tensor(labels, device=logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = [
        -torch.nn.functional.cross_entropy(rows.to(dtype), some, reduction="none")
        for rows, some in zip(logits.split(_ROWS), target.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).clamp(max=0)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument."""
    inner = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return name in inspect.signature(inner.forward).parameters


def model_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def model_device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def check_branches(trunks: Trunks, branches: Sequence[Branch], max_tokens: int) -> None:
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens: expected a number of tokens of at least 1, got {max_tokens!r}")
    for r, (trunk, cut, ids, start) in enumerate(branches):
        if not 0 <= trunk < len(trunks) or not 0 <= cut <= len(trunks[trunk]):
            raise ValueError(f"branches: branch {r} leaves trunk {trunk} after {cut} tokens, where there is none")
        if not 0 <= start <= len(ids) or cut + start < 1 and len(ids):
            raise ValueError(f"branches: branch {r} starts with its token {start}, which is not there or comes first")
