"""`branch_logps`: log-probs of branches by whichever engine the model supports."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...hf.wrappers import eval_mode
from .branch import Branch, BranchLogps, Trunks, check_branches
from .engines import run_engine
from .support import check_positions, choose_engine, why_not


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
    longest = max((b.cut + len(b.ids) for b in branches), default=0)
    check_positions(model, longest - 1)  # the last token is only ever predicted
    with torch.no_grad(), eval_mode(model):
        engine = choose_engine(model, engine, longest)
        return run_engine(
            model, trunks, branches, engine, max_tokens,
            fallback=lambda path: "separate" if why_not(model, "cached", path) else "cached",
        )  # fmt: skip
