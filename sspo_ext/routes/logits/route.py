# SPDX-License-Identifier: Apache-2.0
"""The logits route: log-probs and losses of a batch of logits, by one autograd.Function or by the reference.

`pref` and `logps` choose between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import ops, reference
from ...layout.steps import StepLayout
from ...objective.pair import PairLossSpec, reference_loss, step_loss
from ...objective.sums import in_dtype, step_sums
from ..shared import refuse_double_backward
from ..tree_rows import to_rows, to_tokens
from .gradient import GradientSettings, write_gradient
from .prepare import LogitsCall


def pref(call: LogitsCall, spec: PairLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), step sums (S,), pair losses of each term (C, P)."""
    if call.backend == "reference":
        return reference_loss(reference_tokens(call), call.layout, spec)
    loss, sums, _, losses = _apply(call, spec)
    return loss, sums, losses


def logps(call: LogitsCall) -> tuple[Tensor, Tensor]:
    """Token log-probs (N,), step sums (S,)."""
    if call.backend == "reference":
        tokens = reference_tokens(call)
        return tokens, step_sums(tokens, call.layout, call.backend)
    _, sums, tokens, _ = _apply(call, None)
    return tokens, sums


def reference_tokens(call: LogitsCall) -> Tensor:
    """(N,) token log-probs by plain torch."""
    tokens = reference.token_logps(call.logits, call.layout.rows, call.layout.labels, call.a, call.c)
    return to_tokens(tokens, call.layout)


def _apply(call: LogitsCall, spec: PairLossSpec | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return LogitsRoute.apply(call.logits, call.layout, spec, call.a, call.c, call.backend, call.inplace_backward)


class LogitsRoute(torch.autograd.Function):
    """(B, T, V) logits -> loss (), step sums (S,), token log-probs (N,), pair losses of each term (C, P).

    Forward is launches 1 and 2: the log-probs with their log-sum-exp, then sums, loss and d loss/d logp. Backward is
    launch 3. Beside the logits each row keeps only two numbers, its log-sum-exp and d loss/d logp.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        layout: StepLayout,
        spec: PairLossSpec | None,
        a: float,
        c: float,
        backend: str,
        inplace_backward: bool,
    ):
        tokens, lse = ops.token_logp_fwd(logits, layout.rows, layout.labels, a, c, backend)
        tokens = to_tokens(tokens, layout)
        weights = in_dtype(layout.weights, tokens.dtype)
        loss, sums, pair_losses, coef = step_loss(tokens, weights, layout, spec, backend)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, lse, coef, weights, layout.labels, layout.row_of, layout.step_of_row)
            ctx.settings = GradientSettings(a, c, backend, inplace_backward)
            ctx.tree = layout if layout.tree_rows is not None else None
        ctx.mark_non_differentiable(pair_losses)
        ctx.set_materialize_grads(False)
        return loss, sums, tokens, pair_losses

    @staticmethod
    def backward(ctx, *upstream):
        d_loss, d_sums, d_tokens, _ = upstream
        if d_loss is None and d_sums is None and d_tokens is None:
            return (None,) * 7
        refuse_double_backward()
        logits, lse, coef, weights, labels, row_of, step_of_row = ctx.saved_tensors
        if d_sums is not None or d_tokens is not None:
            coef = _total_coef(coef, weights, step_of_row, d_loss, d_sums, d_tokens)
            d_loss = None
        if ctx.tree is not None:
            coef = to_rows(coef, ctx.tree)
        d_logits = write_gradient(logits, row_of, labels, lse, coef, d_loss, ctx.settings, ctx.tree)
        return d_logits, None, None, None, None, None, None


def _total_coef(coef, weights, step_of_row, d_loss, d_sums, d_tokens) -> Tensor:
    """d/dlogp (N,) when gradients arrive at the sums or the tokens, not only at the loss."""
    total = torch.zeros_like(coef) if d_loss is None else coef * d_loss
    if d_sums is not None:
        per_row = d_sums[step_of_row]
        total = total + (per_row if weights is None else per_row * weights)
    if d_tokens is not None:
        total = total + d_tokens
    return total
