# SPDX-License-Identifier: Apache-2.0
"""Entropy, sum of squared probabilities and KL from a reference, in the same read of the logits as the log-prob.

`logps_with_reductions` chooses between kernels and reference.

With p = softmax(z) and q the reference's, per row: H = -sum p log p, s = sum p^2, k = sum q (log q - log p). Then
dH/dz = -p (log p + H), ds/dz = 2 p (p - s), dk/dz = p - q, so one pass writes
dz = g (onehot - p) + p (constant + log_p log p + square p) - kappa q with five numbers a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ..._checks import check_device, check_float, check_shape
from ...backends import ops, reference
from ...layout.steps import StepLayout
from ...objective.sums import StepLogps, step_sums, with_reductions
from ..kept import narrowed
from ..shared import gradient_coefs, refuse_double_backward
from ..tree_rows import of_tokens
from .gradient import GradientSettings, write_gradient
from .prepare import LogitsCall, no_inplace


def logps_with_reductions(call: LogitsCall, ref_logits: Tensor | None, *, entropy: bool, sum_p2: bool) -> StepLogps:
    """Step log-probs with the reductions that are asked for, and with kl if there are logits of a reference."""
    logits, layout = call.logits, call.layout
    if ref_logits is not None:
        ref_logits = _checked_reference(ref_logits, call)
    name = backends.with_reductions(call.requested, call.backend)
    if call.inplace_backward and name == "reference":
        raise ValueError(no_inplace(logits, "no other has entropy, sum_p2 and kl here"))
    if name == "reference":
        tokens = reference.token_logps(logits, layout.rows, layout.labels, call.a, call.c)
        values = reference.row_reductions(logits, layout.rows, ref_logits, call.a, call.c)
    else:
        tokens, *values = ReductionsRoute.apply(
            logits, ref_logits, layout, call.a, call.c, (entropy, sum_p2), name, call.inplace_backward
        )
    wanted = (entropy, sum_p2, ref_logits is not None)
    tokens = of_tokens(tokens, layout)
    values = [v if v is None or not len(v) else of_tokens(v, layout) for v in values]
    return with_reductions(tokens, step_sums(tokens, layout, name), layout, values, wanted)


def _checked_reference(ref_logits: Tensor, call: LogitsCall) -> Tensor:
    check_float("kl_ref_logits", ref_logits, ndim=(2, 3))
    check_device("kl_ref_logits", ref_logits, call.logits.device, "logits")
    check_shape("kl_ref_logits", ref_logits, tuple(call.logits.shape[3 - ref_logits.ndim :]))
    ref_logits = call.layout.check_logits(ref_logits.detach(), "kl_ref_logits")
    if ref_logits.dtype != call.logits.dtype:
        raise TypeError(f"kl_ref_logits: expected {call.logits.dtype}, as the logits are, got {ref_logits.dtype}")
    return narrowed(ref_logits, call.layout.rows, call.layout.kept)


class ReductionsRoute(torch.autograd.Function):
    """(B, T, V) logits -> tokens, entropy, sum_p2, kl, (N,) each.

    What is not asked for is empty, and so is kl without a reference. One read forward, one read and one write backward.
    Beside the logits each row keeps two log-sum-exps, H and s.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        ref_logits: Tensor | None,
        layout: StepLayout,
        a: float,
        c: float,
        wanted: tuple[bool, bool],  # entropy, sum_p2
        backend: str,
        inplace_backward: bool,
    ):
        tokens, lse, entropy, sum_p2, kl, ref_lse = ops.row_reductions_fwd(
            logits, layout.rows, layout.labels, ref_logits, a, c, *wanted, backend
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, ref_logits, lse, ref_lse, entropy, sum_p2, layout.labels, layout.row_of)
            ctx.wanted, ctx.settings = wanted, GradientSettings(a, c, backend, inplace_backward)
            ctx.tree = layout if layout.tree_rows is not None else None
        asked = zip((entropy, sum_p2, kl), (*wanted, ref_logits is not None), strict=True)
        ctx.mark_non_differentiable(*[value for value, wants in asked if not wants])
        ctx.set_materialize_grads(False)
        return tokens, entropy, sum_p2, kl

    @staticmethod
    def backward(ctx, *upstream):
        d_tokens, d_entropy, d_sum_p2, d_kl = upstream
        logits, ref, lse, ref_lse, entropy, sum_p2, labels, row_of = ctx.saved_tensors
        wanted = ctx.wanted
        # under torch.compile an empty output gets an empty gradient
        d_entropy, d_sum_p2 = d_entropy if wanted[0] else None, d_sum_p2 if wanted[1] else None
        d_kl = None if ref is None else d_kl
        if all(d is None for d in (d_tokens, d_entropy, d_sum_p2, d_kl)):
            return (None,) * 8
        refuse_double_backward()
        coefs = gradient_coefs(entropy, sum_p2, d_tokens, d_entropy, d_sum_p2, d_kl)
        ref = (None if d_kl is None else ref, ref_lse)
        d_logits = write_gradient(logits, row_of, labels, lse, coefs, None, ctx.settings, ctx.tree, ref)
        return d_logits, None, None, None, None, None, None, None
