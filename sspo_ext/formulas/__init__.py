"""The pair losses as functions of two steps' scores: one definition each, in torch ops, differentiated by autograd.

`python -m sspo_ext.backends.generate` traces these definitions and their autograd derivatives and writes the fused
forms (csrc/formulas_generated.h, backends/triton/formulas_generated.py), so no loss is written twice by hand. A head's number
there is its place in PAIR_HEADS, so new ones are added at the end.
"""

from . import difference, singles, likelihood  # noqa: I001 (their order is the heads' numbers)
from .registry import MAX_OPTIONS, PAIR_HEADS, Limit, PairHead, PairScores, get_pair_head, head_id

__all__ = ["MAX_OPTIONS", "PAIR_HEADS", "Limit", "PairHead", "PairScores", "get_pair_head", "head_id"]
del difference, singles, likelihood
