# SPDX-License-Identifier: Apache-2.0
"""The policy losses from logits: three launches forward and one or two backward where the backend has their kernels.

`policy` chooses between these and torch operations on the log-probs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...backends import ops
from ...layout.steps import StepLayout
from ...objective.policy import PolicyProblem
from ..shared import refuse_double_backward
from ..tree_rows import to_rows, to_tokens
from .gradient import GradientSettings, write_gradient
from .prepare import LogitsCall
from .reductions import logps_with_reductions
from .route import logps


def policy(call: LogitsCall, problem: PolicyProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (), token log-probs (N,) and, with an entropy bonus, the entropy of each row (N,)."""
    wants_entropy = problem.entropy_coef != 0
    name = backends.with_reductions(call.requested, call.backend) if wants_entropy else call.backend
    if problem.fused and name == problem.backend:
        loss, tokens, entropy = PolicyRoute.apply(
            call.logits, call.layout, problem, call.a, call.c, call.inplace_backward
        )
        return loss, tokens, entropy if wants_entropy else None
    if wants_entropy:
        scored = logps_with_reductions(call, None, entropy=True, sum_p2=False)
        tokens, entropy = scored.tokens, scored.entropy
    else:
        tokens, entropy = logps(call)[0], None
    return problem.loss(tokens, entropy), tokens, entropy


class PolicyRoute(torch.autograd.Function):
    """(B, T, V) logits -> loss (), token log-probs (N,), entropy (N,) or empty; the loss alone has a gradient.

    Forward is launches 1 and 2, backward launch 3. Beside the logits each row keeps its log-sum-exp and d loss/d logp,
    or with an entropy bonus the five numbers of its gradient.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        layout: StepLayout,
        problem: PolicyProblem,
        a: float,
        c: float,
        inplace_backward: bool,
    ):
        wants_entropy, backend = problem.entropy_coef != 0, problem.backend
        if wants_entropy:
            tokens, lse, entropy, *_ = ops.row_reductions_fwd(
                logits, layout.rows, layout.labels, None, a, c, True, False, backend
            )
        else:
            tokens, lse = ops.token_logp_fwd(logits, layout.rows, layout.labels, a, c, backend)
            entropy = tokens.new_empty(0)
        tokens = to_tokens(tokens, layout)
        entropy = to_tokens(entropy, layout) if wants_entropy else entropy
        loss, coefs = problem.evaluate(tokens, entropy)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, lse, coefs, layout.labels, layout.row_of)
            ctx.settings = GradientSettings(a, c, backend, inplace_backward)
            ctx.tree = layout if layout.tree_rows is not None else None
        ctx.mark_non_differentiable(tokens, entropy)
        ctx.set_materialize_grads(False)
        return loss, tokens, entropy

    @staticmethod
    def backward(ctx, *upstream):
        d_loss = upstream[0]
        if d_loss is None:
            return (None,) * 6
        refuse_double_backward()
        logits, lse, coefs, labels, row_of = ctx.saved_tensors
        if ctx.tree is not None:
            coefs = to_rows(coefs, ctx.tree)
        ref = None
        if coefs.ndim == 2:
            coefs, d_loss, ref = coefs * d_loss, None, (None, lse[:0])
        d_logits = write_gradient(logits, row_of, labels, lse, coefs, d_loss, ctx.settings, ctx.tree, ref)
        return d_logits, None, None, None, None, None
