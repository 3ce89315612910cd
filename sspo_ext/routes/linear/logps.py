# SPDX-License-Identifier: Apache-2.0
"""Log-probs from hidden states: by an autograd.Function that gets d/dlogp in backward, or by the reference.

`logps` chooses between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout.steps import StepLayout
from ...objective.sums import step_sums
from ..shared import refuse_double_backward
from ..tree_rows import added_branches, extra_rows, gradient_places, of_tokens, plan_offsets
from . import ops as linear_ops
from .gradients import scale_rows
from .reference import reference_tokens
from .settings import LinearCall, LinearSettings


def logps(call: LinearCall) -> tuple[Tensor, Tensor]:
    """Token log-probs (N,), step sums (S,)."""
    if call.settings.backend == "reference":
        tokens = reference_tokens(call)
    else:
        tokens = token_logps(call)
    return tokens, step_sums(tokens, call.layout, call.settings.backend)


def token_logps(call: LinearCall) -> Tensor:
    """(N,) token log-probs by the kernels."""
    tokens = LinearLogpsRoute.apply(call.hidden, call.weight, call.bias, call.layout, call.settings)
    return of_tokens(tokens, call.layout)


class LinearLogpsRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> log-probs (U,) of the rows.

    With a frozen head a row's gradient is a scalar times a direction, which forward keeps. Otherwise backward computes
    the logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: StepLayout, settings: LinearSettings):
        needs, offsets, extra = settings.needs(ctx), plan_offsets(layout), extra_rows(layout)
        in_forward = [linear_ops.is_frozen(needs), False, False]
        tokens, lse, directions = linear_ops.linear_logps_fwd(
            *settings.op_args(hidden, weight, bias, layout.rows, layout.labels, offsets, in_forward, extra, layout.kept)
        )
        if in_forward[0]:
            ctx.save_for_backward(gradient_places(layout.rows, extra, hidden.shape[0]), directions)
        elif any(needs):
            ctx.save_for_backward(layout.rows, hidden, weight, bias, layout.labels, offsets, lse, extra)
        ctx.needs, ctx.settings, ctx.layout = needs, settings, layout
        ctx.dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        return tokens

    @staticmethod
    def backward(ctx, *upstream):
        (d_tokens,) = upstream
        refuse_double_backward()
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        if linear_ops.is_frozen(needs):
            places, directions = ctx.saved_tensors
            d_hidden = scale_rows(directions, places, d_tokens, settings.backend)
            return added_branches(d_hidden, ctx.layout).to(dtype), None, None, None, None
        rows, hidden, weight, bias, labels, offsets, lse, extra = ctx.saved_tensors
        d_hidden, d_weight, d_bias = linear_ops.linear_logps_bwd(
            *settings.op_args(hidden, weight, bias, rows, labels, offsets, needs, extra, ctx.layout.kept),
            lse,
            d_tokens.contiguous(),
        )
        return (
            added_branches(d_hidden, ctx.layout) if needs[0] else None,
            settings.deliver_weight(d_weight, None) if needs[1] else None,
            d_bias.to(bias_dtype) if needs[2] else None,
            None,
            None,
        )
