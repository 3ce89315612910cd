# SPDX-License-Identifier: Apache-2.0
"""The policy losses from hidden states and the LM head, without ever storing the logits.

Tokens interact only through the ratio of their step or sequence; normalisers are constants of the layout. So the rows
of whole steps or sequences share a chunk, whose derivative is known while its logits are still there, and a trained
head costs three GEMMs. `policy` chooses between kernels and reference.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ... import backends
from ...formulas.dual import derivative
from ...layout.steps import StepLayout
from ...objective.idle import offsets_among
from ...objective.policy import POLICY_SCHEMA, PolicyProblem, pack_problem, unpack_problem
from ...objective.values import copied
from ..shared import gradient_coefs, refuse_double_backward, scale_kept
from . import engine
from .cache import cached_plan
from .gradients import Gradients, start_gradients
from .head import Head
from .logps import logps
from .ops import HeadCall, is_frozen, register_head_op
from .plan import LinearPlan, make_policy_plan
from .reductions import logps_with_reductions
from .settings import LinearCall, LinearSettings


def _linear_policy_fwd(call: HeadCall, *packed):
    head, problem = call.head(), unpack_problem(packed, call.backend)
    units, products, num_rows = problem.segments, call.products(), call.rows.shape[0]
    offsets = None if units is None else units.host_offsets

    def make() -> LinearPlan:
        return make_policy_plan(None if offsets is None else offsets.numpy(), num_rows, products)

    plan = cached_plan(make, call.host_step_offsets, offsets, "policy", *vars(products).values())
    gradients = start_gradients(head, plan, call.hidden, call.hidden.dtype, call.accum_dtype)
    tokens, entropy = run_policy(head, call.gathered(plan), plan, problem, gradients)
    return tokens, entropy, *call.results(head, gradients)


def _linear_policy_fwd_fake(call: HeadCall, *packed):
    entropy_coef = packed[-1]
    return (
        call.weight.new_empty(call.rows.shape, dtype=call.acc_dtype),
        call.weight.new_empty(call.rows.shape if entropy_coef else 0, dtype=call.acc_dtype),
        *call.fake_results(call.hidden.dtype),
    )


linear_policy_fwd = register_head_op(
    "linear_policy_fwd",
    POLICY_SCHEMA,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_policy_fwd,
    _linear_policy_fwd_fake,
)


def run_policy(
    head: Head, rows: engine.Rows, plan: LinearPlan, problem: PolicyProblem, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """Tokens (N,), entropy (N,) or empty; gradients of sum(scale * rows) - entropy_coef * sum(scale * entropy)."""
    device, wants_entropy = rows.labels.device, problem.entropy_coef != 0
    tokens = torch.empty(plan.num_rows, dtype=head.acc_dtype, device=device)
    lse = torch.empty_like(tokens, dtype=torch.float64)
    entropy = torch.empty(plan.num_rows * wants_entropy, dtype=head.acc_dtype, device=device)
    head.allocate(plan)

    def forward(start: int, end: int) -> engine.Chunk:
        chunk = engine.compute_chunk(head, rows, start, end)
        if wants_entropy:
            parts = head.reductions(chunk.logits, chunk.labels, None, sum_p2=False)
            tokens[start:end], lse[start:end], entropy[start:end] = parts[:3]
        else:
            tokens[start:end], lse[start:end] = head.logps(chunk.logits, chunk.labels)
        return chunk

    def coefs_of(start: int, end: int) -> Tensor:
        """Of each row its gradient's five numbers (R, 5), or without an entropy bonus d loss/d logp (R,)."""
        part = problem.part(start, end)
        if problem.fused:
            return part.evaluate(tokens[start:end], entropy[start:end])[1]
        coef = derivative(part.rows, tokens[start:end]) * part.scale
        if not wants_entropy:
            return coef
        d_entropy = -problem.entropy_coef * part.scale
        return gradient_coefs(entropy[start:end], None, coef, d_entropy, None, None)

    def backward(start: int, end: int, chunk: engine.Chunk, coefs: Tensor) -> None:
        if wants_entropy:
            head.reductions_to_gradient(chunk.logits, chunk.labels, lse[start:end], None, lse[:0], coefs)
        else:
            head.to_gradient(chunk.logits, chunk.labels, lse[start:end], coefs)
        gradients.add(head, chunk.logits, chunk.hidden, chunk.places)

    for group in plan.groups:
        in_buffer = None
        for start, end in group.chunks:
            in_buffer = forward(start, end)
        if group.kind == "logps":
            continue
        coefs = coefs_of(group.start, group.end)
        for start, end in reversed(group.chunks):  # the last chunk's logits are still in the buffer
            chunk = in_buffer or engine.compute_chunk(head, rows, start, end)
            backward(start, end, chunk, coefs[start - group.start : end - group.start])
            in_buffer = None
    return tokens, entropy


def policy(call: LinearCall, problem: PolicyProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (), token log-probs (N,) and, with an entropy bonus, the entropy of each row (N,).

    Log-probs of rows that the problem skips are NaN.
    """
    if problem.idle is None or (problem.skipped is None and not any(call.needs)):
        return _policy(call, problem)
    layout = call.layout
    busy, places = _places(~problem.idle, layout)
    some = _only(call, busy, places)
    loss, values, _ = _policy(some, problem.only(busy, places, some.layout.step_offsets))
    tokens = values.new_full((layout.num_rows,), torch.nan).index_copy(0, places, values.detach())
    if problem.skipped is None:  # one product for rows that need no gradient
        idle, places = _places(problem.idle, layout)
        rest = _only(call, idle, places)
        with torch.no_grad():
            values = logps(replace(rest, settings=replace(rest.settings, record=False)))[0]
        tokens.index_copy_(0, places, values)
        loss = loss + 0 * values.sum()  # what is not finite shows
    return loss, tokens, None


def _places(rows: np.ndarray, layout: StepLayout) -> tuple[np.ndarray, Tensor]:
    """The rows that are set in a mask (N,), on the host and on the device."""
    kept = np.flatnonzero(rows)
    return kept, copied(torch.from_numpy(kept), layout.device)


def _only(call: LinearCall, kept: np.ndarray, places: Tensor) -> LinearCall:
    """The call for some rows of its layout."""
    layout = call.layout
    offsets = torch.from_numpy(offsets_among(layout.host_step_offsets.numpy(), kept))
    some = replace(
        layout, rows=layout.rows[places], labels=layout.labels[places], step_of_row=layout.step_of_row[places],
        weights=None if layout.weights is None else layout.weights[places], host_step_offsets=offsets,
        step_offsets=copied(offsets.to(torch.int32), layout.device),
    )  # fmt: skip
    return replace(call, layout=some)


def _policy(call: LinearCall, problem: PolicyProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, of rows that all have a gradient."""
    layout, settings, wants_entropy = call.layout, call.settings, problem.entropy_coef != 0
    needs = call.needs
    # float16 gradients wait for the loss scale, which is known in backward
    in_forward = any(needs) and (wants_entropy or not is_frozen(needs)) and settings.dtype != torch.float16
    name = backends.with_reductions(settings.requested, settings.backend) if wants_entropy else settings.backend
    if name == "reference" or not in_forward:
        if wants_entropy:
            scored = logps_with_reductions(call, None, entropy=True, sum_p2=False)
            tokens, entropy = scored.tokens, scored.entropy
        else:
            tokens, entropy = logps(call)[0], None
        return problem.loss(tokens, entropy), tokens, entropy
    loss, tokens, entropy = LinearPolicyRoute.apply(call.hidden, call.weight, call.bias, layout, problem, settings)
    return loss, tokens, entropy if wants_entropy else None


class LinearPolicyRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> loss (), tokens (N,), entropy (N,); gradients made in forward."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: StepLayout,
        problem: PolicyProblem,
        settings: LinearSettings,
    ):
        needs = settings.needs(ctx)
        tokens, entropy, d_hidden, d_weight, d_bias = linear_policy_fwd(
            *settings.op_args(hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, needs),
            *pack_problem(problem),
        )
        if any(needs):
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
            ctx.needs, ctx.settings = needs, settings
            ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(tokens, entropy)
        ctx.set_materialize_grads(False)
        return problem.loss(tokens, entropy), tokens, entropy

    @staticmethod
    def backward(ctx, *upstream):
        d_loss = upstream[0]
        if d_loss is None:
            return (None,) * 6
        refuse_double_backward()
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        needs, settings = ctx.needs, ctx.settings
        return (
            scale_kept(d_hidden, d_loss, settings.backend) if needs[0] else None,
            settings.deliver_weight(d_weight, d_loss) if needs[1] else None,
            (d_bias * d_loss).to(ctx.bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )
