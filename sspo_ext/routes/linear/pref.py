# SPDX-License-Identifier: Apache-2.0
"""The pair loss from hidden states: by an autograd.Function that makes its gradients in forward, or by the reference.

`pref` chooses between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.addresses import accumulator
from ...layout.steps import StepLayout
from ...objective.pair import PairLossSpec, pack_terms, reference_loss, step_loss
from ...objective.sums import in_dtype
from ..shared import refuse_double_backward, scale_kept
from ..tree_rows import added_branches, extra_rows, gradient_places, host_row
from . import ops as linear_ops
from .gradients import scale_rows
from .logps import token_logps
from .reference import reference_tokens
from .settings import LinearCall, LinearSettings


def pref(call: LinearCall, spec: PairLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), step sums (S,), pair losses of each term (C, P)."""
    layout, settings = call.layout, call.settings
    if settings.backend == "reference":
        return reference_loss(reference_tokens(call), layout, spec)
    if settings.waits_for_loss_scale(call.weight, call.bias):
        return TokensLoss.apply(token_logps(call), layout, spec, settings.backend)
    return LinearPrefRoute.apply(call.hidden, call.weight, call.bias, layout, spec, settings)


class LinearPrefRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> loss (), sums (S,), pair losses (C, P); gradients made in forward."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: StepLayout,
        spec: PairLossSpec,
        settings: LinearSettings,
    ):
        needs, acc, pairs = settings.needs(ctx), accumulator(settings.dtype), spec.pairs
        extra = extra_rows(layout)
        loss, sums, pair_losses, coef, d_hidden, d_weight, d_bias = linear_ops.linear_pref_fwd(
            *settings.op_args(
                hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, needs, extra, layout.kept
            ),
            in_dtype(layout.weights, acc), in_dtype(spec.ref, acc), pairs.host_index, in_dtype(pairs.weights, acc),
            in_dtype(pairs.margins, acc), in_dtype(pairs.soft_labels, acc), in_dtype(spec.token_pair_weights, acc),
            spec.scale.to(acc), host_row(layout), *pack_terms(spec.terms),
        )  # fmt: skip
        if any(needs):
            if needs[0] and not linear_ops.is_frozen(needs):
                d_hidden = added_branches(d_hidden, layout)
            places = gradient_places(layout.rows, extra, hidden.shape[0])
            ctx.save_for_backward(places, coef, d_hidden, d_weight, d_bias)
            ctx.needs, ctx.settings, ctx.layout = needs, settings, layout
            ctx.dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums, pair_losses)
        ctx.set_materialize_grads(False)
        return loss, sums, pair_losses

    @staticmethod
    def backward(ctx, *upstream):
        d_loss = upstream[0]
        if d_loss is None:
            return (None,) * 6
        refuse_double_backward()
        places, coef, d_hidden, d_weight, d_bias = ctx.saved_tensors
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        if linear_ops.is_frozen(needs):
            d_hidden = scale_rows(d_hidden, places, coef * d_loss, settings.backend)
            d_hidden = added_branches(d_hidden, ctx.layout).to(dtype)
        elif needs[0]:
            d_hidden = scale_kept(d_hidden, d_loss, settings.backend)
        return (
            d_hidden if needs[0] else None,
            settings.deliver_weight(d_weight, d_loss) if needs[1] else None,
            (d_bias * d_loss).to(bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )


class TokensLoss(torch.autograd.Function):
    """(N,) token log-probs -> loss (), step sums (S,), pair losses of each term (C, P), by launch 2."""

    @staticmethod
    def forward(ctx, tokens: Tensor, layout: StepLayout, spec: PairLossSpec, backend: str):
        weights = in_dtype(layout.weights, tokens.dtype)
        loss, sums, pair_losses, coef = step_loss(tokens, weights, layout, spec, backend)
        ctx.save_for_backward(coef)
        ctx.mark_non_differentiable(sums, pair_losses)
        return loss, sums, pair_losses

    @staticmethod
    def backward(ctx, *upstream):
        (coef,) = ctx.saved_tensors
        return coef * upstream[0], None, None, None
