# SPDX-License-Identifier: Apache-2.0
"""Between the U rows of a layout and its N scored tokens, which differ in a tree of sequences; for both routes.

The kernels see rows, each once. Steps, pairs and policy losses see tokens. Sums are made in double and in the order of
the tokens, so they have the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.ops import register
from ..layout.steps import StepLayout
from ..layout.tree_rows import Branches, SharedRows


def _add_in_order(values: Tensor, index: Tensor, size: int) -> Tensor:
    total = torch.zeros((size, *values.shape[1:]), dtype=torch.float64, device=values.device)
    if values.device.type == "cuda":
        # sorted by index, where index_add_ has atomics
        total.index_put_((index,), values.double(), accumulate=True)
    else:
        total.index_add_(0, index, values.double())
    return total.to(values.dtype)


# an op: torch.compile would turn the sum into atomics
add_in_order = register(
    "add_in_order",
    "(Tensor values, Tensor index, SymInt size) -> Tensor",
    _add_in_order,
    lambda values, index, size: values.new_empty((size, *values.shape[1:])),
)


def shared_rows(layout: StepLayout) -> SharedRows | None:
    """The table from tokens to rows; None where row n is token n's."""
    return None if layout.tree_rows is None else layout.tree_rows.shared


def host_row(layout: StepLayout) -> Tensor | None:
    """(N,) int64: that table on the host."""
    shared = shared_rows(layout)
    return None if shared is None else shared.host_row


def branches(layout: StepLayout) -> Branches | None:
    """The positions that predict several labels; None where none does."""
    return None if layout.tree_rows is None else layout.tree_rows.branches


def extra_rows(layout: StepLayout) -> Tensor | None:
    """(E,): the rows that are further labels of a position."""
    found = branches(layout)
    return None if found is None else found.extra


def plan_offsets(layout: StepLayout) -> Tensor:
    """(S + 1,) int64 on the host, for a plan in which steps do not matter: it ends with the number of rows."""
    shared = shared_rows(layout)
    return layout.host_step_offsets if shared is None else shared.host_offsets


def to_tokens(values: Tensor, layout: StepLayout) -> Tensor:
    """(U,) values of rows -> (N,) of tokens."""
    shared = shared_rows(layout)
    return values if shared is None else values.index_select(0, shared.row)


def to_rows(values: Tensor, layout: StepLayout) -> Tensor:
    """(N,) or (N, K) values of tokens -> their sums over each row, (U,) or (U, K)."""
    shared = shared_rows(layout)
    return values if shared is None else add_in_order(values.contiguous(), shared.row, layout.rows.shape[0])


class OfTokens(torch.autograd.Function):
    """(U,) values of rows -> (N,) of tokens; backward adds up in order."""

    @staticmethod
    def forward(ctx, values: Tensor, layout: StepLayout):
        ctx.layout = layout
        return to_tokens(values, layout)

    @staticmethod
    def backward(ctx, *upstream):
        return to_rows(upstream[0], ctx.layout), None


def of_tokens(values: Tensor, layout: StepLayout) -> Tensor:
    """`to_tokens`, differentiable."""
    return values if shared_rows(layout) is None else OfTokens.apply(values, layout)


def whole_coefs(coef: Tensor, of: Branches) -> Tensor:
    """Coefficients (U,) or (U, K) with the sum over its rows at the first row of each branching position."""
    more = add_in_order(coef.index_select(0, of.extra), of.position, of.first.shape[0])
    return coef.index_add(0, of.first, more)


def added_branches(gradients: Tensor, layout: StepLayout) -> Tensor:
    """(N0, H) from (N0 + E, H): the gradients of extra rows added, in float32, to those of their positions."""
    of = branches(layout)
    if of is None:
        return gradients
    size = gradients.shape[0] - of.extra.shape[0]
    at, wide = layout.rows.index_select(0, of.first), torch.promote_types(gradients.dtype, torch.float32)
    more = add_in_order(gradients[size:].to(wide), of.position, of.first.shape[0])
    whole = gradients[:size]
    return whole.index_copy(0, at, (whole.index_select(0, at).to(wide) + more).to(whole.dtype))


def gradient_places(rows: Tensor, extra: Tensor | None, size: int) -> Tensor:
    """(U,): where each row's gradient is kept among (size + E): at its position, those of extra rows after all."""
    if extra is None:
        return rows
    return rows.index_copy(0, extra, size + torch.arange(extra.shape[0], device=rows.device))
