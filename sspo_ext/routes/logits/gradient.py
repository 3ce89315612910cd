# SPDX-License-Identifier: Apache-2.0
"""Launch 3, and what it leaves out where one position predicts several labels: their one-hot terms.

The gradients of such a position's rows differ only there. So the kernel gets the sum of their coefficients and no
label, and each label's term is added to its element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import ops
from ...layout.steps import StepLayout
from ...layout.tree_rows import Branches
from ..tree_rows import branches, whole_coefs


class GradientSettings(NamedTuple):
    """How the gradient of the logits is written."""

    a: float
    c: float
    backend: str
    inplace: bool


def write_gradient(
    logits: Tensor,  # (B, T, V)
    row_of: Tensor,  # (B*T,) int32
    labels: Tensor,  # (U,)
    lse: Tensor,  # (U,)
    coef: Tensor,  # (U,) d loss / d logp, or (U, 5) of `shared.gradient_coefs`
    upstream: Tensor | None,  # () multiplies `coef`, if (U,)
    settings: GradientSettings,
    layout: StepLayout | None,  # of a tree
    ref: tuple[Tensor | None, Tensor] | None = None,  # the reference's logits and lse, beside (U, 5) coefficients
) -> Tensor:
    """The gradient of the logits, over the logits themselves with `inplace`."""
    a, c, backend, inplace = settings
    terms = None
    of = None if layout is None else branches(layout)
    if layout is not None and of is not None:
        coef, upstream = coef if upstream is None else coef * upstream, None
        terms = _one_hot_terms(logits, layout, of, coef if coef.ndim == 1 else coef[:, 0], a, c)
        coef, labels = whole_coefs(coef, of), labels.index_fill(0, of.first, -1)
    if ref is None:
        args = (logits, row_of, labels, lse, coef, upstream, a, c, backend)
        into, over = ops.token_logp_bwd, ops.token_logp_bwd_
    else:
        args = (logits, row_of, labels, lse, *ref, coef, a, c, backend)
        into, over = ops.row_reductions_bwd, ops.row_reductions_bwd_
    if inplace:
        over(*args)
        d_logits = logits.detach()  # the saved logits would keep the model's graph alive
    else:
        d_logits = into(*args)
    if terms is not None:
        at, values = terms
        d_logits.index_put_(at, (d_logits[at].to(values.dtype) + values).to(d_logits.dtype))
    return d_logits


def _one_hot_terms(
    logits: Tensor, layout: StepLayout, of: Branches, g: Tensor, a: float, c: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Which elements of (B, T, V) the labels of branching positions are, no two the same, and what to add there."""
    rows = torch.cat([of.first, of.extra])
    length, vocab = logits.shape[1:]
    position, label = layout.rows.index_select(0, rows), layout.labels.index_select(0, rows)
    at = (position // length, position % length, label.clamp(0, vocab - 1))
    values = g.index_select(0, rows)
    if c:
        x = logits[at].to(values.dtype)
        values = values * (1 - torch.tanh(a * x).square()) * (a * c)
    else:
        values = values * a
    return at, torch.where(label < vocab, values, torch.nan)  # unchecked labels of a compiled graph
