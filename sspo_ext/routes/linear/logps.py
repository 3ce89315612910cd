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
    return LinearLogpsRoute.apply(call.hidden, call.weight, call.bias, call.layout, call.settings)


class LinearLogpsRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> token log-probs (N,).

    With a frozen head a row's gradient is a scalar times a direction, which forward keeps. Otherwise backward computes
    the logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: StepLayout, settings: LinearSettings):
        needs = settings.needs(ctx)
        in_forward = [linear_ops.is_frozen(needs), False, False]
        tokens, lse, directions = linear_ops.linear_logps_fwd(
            *settings.op_args(hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, in_forward)
        )  # fmt: skip
        if in_forward[0]:
            ctx.save_for_backward(layout.rows, directions)
        elif any(needs):
            ctx.save_for_backward(layout.rows, hidden, weight, bias, layout.labels, layout.host_step_offsets, lse)
        ctx.needs, ctx.settings = needs, settings
        ctx.dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        return tokens

    @staticmethod
    def backward(ctx, *upstream):
        (d_tokens,) = upstream
        refuse_double_backward()
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        if linear_ops.is_frozen(needs):
            rows, directions = ctx.saved_tensors
            return scale_rows(directions, rows, d_tokens, settings.backend).to(dtype), None, None, None, None
        rows, hidden, weight, bias, labels, offsets, lse = ctx.saved_tensors
        d_hidden, d_weight, d_bias = linear_ops.linear_logps_bwd(
            *settings.op_args(hidden, weight, bias, rows, labels, offsets, needs), lse, d_tokens.contiguous()
        )
        return (
            d_hidden if needs[0] else None,
            settings.deliver_weight(d_weight, None) if needs[1] else None,
            d_bias.to(bias_dtype) if needs[2] else None,
            None,
            None,
        )
