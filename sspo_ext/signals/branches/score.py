# SPDX-License-Identifier: Apache-2.0
"""`branch_logps`: log-probs of continuations that branch off from sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...hf.wrappers import eval_mode
from ...tree.support import check_positions
from .branch import TOKENS, Branch, BranchLogps, Trunks, check_branches
from .engines import run_engine
from .support import choose_engine, why_not


def branch_logps(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    *,
    engine: str = "auto",
    max_tokens: int = 4096,
) -> BranchLogps:
    """Compute the log-prob of every scored token of every branch, without gradient.

    This is log p(branch token | trunk[:cut], the branch so far) for many branches that share most of their context,
    such as probes after each step, or candidates for the next one. Four engines give the same numbers:

        separate   one forward for each branch, without padding, mask or cache: the specification
        packed     one forward for a trunk and all of its branches, as a tree: equal tokens after equal contexts are
                   computed once, and a 4-D mask lets each token see only its own path from the root
        shared     "packed", where trunks that begin alike share their beginnings too, under `sspo_ext.tree`'s attention
        cached     one forward for the trunk, then one with its branches as rows, which continue the trunk's cache under
                   a mask that hides what lies behind their cut

    "auto" takes the first of packed, cached and separate that the model supports; see `why_not`. Where a path is longer
    than `max_tokens`, "packed" runs it as "cached", or as "separate" if the model does not support that.

    Args:
        model: any Hugging Face causal LM, wrapped or not. It runs in eval mode, and its modes are restored.
        trunks: lists of token ids.
        branches: any number of branches of each trunk, in any order.
        engine: "separate", "packed", "shared", "cached" or "auto".
        max_tokens: the budget of one forward in tokens, padding included. A forward has at least one trunk and branch.

    Returns:
        The log-probs of all scored tokens, in the order of `branches`.

    Raises:
        ValueError: if a scored token has no token before it, a branch leaves its trunk where the trunk has no token, a
            path is longer than the model's table of positions, or the model does not support the engine (the message
            has the reason).

    Examples:
        >>> trunk = tokenizer("6 + 13 + 7 = ?").input_ids
        >>> branches = [Branch(0, len(trunk), tokenizer(text).input_ids) for text in ("26", "27")]
        >>> branch_logps(model, [trunk], branches).sums().shape
        torch.Size([2])
    """
    check_branches(trunks, branches, max_tokens)
    longest = max((b.cut + len(b.ids) for b in branches), default=0)
    check_positions("trunks", model, longest - 1, TOKENS)  # the last token is only predicted
    with torch.no_grad(), eval_mode(model):
        engine = choose_engine(model, engine, longest)
        return run_engine(
            model, trunks, branches, engine, max_tokens,
            fallback=lambda path: "separate" if why_not(model, "cached", path) else "cached",
        )  # fmt: skip
