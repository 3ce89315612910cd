# SPDX-License-Identifier: Apache-2.0
"""The pair losses as functions of two steps' scores: one definition each, in torch ops, differentiated by autograd.

`python -m tools.generate_formulas` traces each definition and its derivative and writes the fused forms
(csrc/formulas_generated.h, backends/triton/formulas_generated.py), so no loss is written twice by hand. Kernels know a
formula by its place in PAIR_FORMULAS, so new ones are added at the end.
"""

from . import difference, singles, likelihood  # noqa: I001 (their order is the formulas' numbers)
from .registry import MAX_OPTIONS, PAIR_FORMULAS, Limit, PairFormula, PairScores, formula_id, get_pair_formula

__all__ = ["MAX_OPTIONS", "PAIR_FORMULAS", "Limit", "PairFormula", "PairScores", "formula_id", "get_pair_formula"]
del difference, singles, likelihood
