"""The pair losses as functions of two steps' scores: one definition each, in torch ops, differentiated by autograd.

`python -m sspo_ext.backends.generate` traces these definitions and their autograd derivatives and writes the fused
forms (csrc/formulas_generated.h, backends/triton/formulas_generated.py), so no loss is written twice by hand. A formula's number
there is its place in PAIR_FORMULAS, so new ones are added at the end.
"""

from . import difference, singles, likelihood  # noqa: I001 (their order is the formulas' numbers)
from .registry import MAX_OPTIONS, PAIR_FORMULAS, Limit, PairFormula, PairScores, get_pair_formula, formula_id

__all__ = ["MAX_OPTIONS", "PAIR_FORMULAS", "Limit", "PairFormula", "PairScores", "get_pair_formula", "formula_id"]
del difference, singles, likelihood
