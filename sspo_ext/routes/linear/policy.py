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
from ...layout.tree_rows import rows_among
from ...objective.idle import offsets_among
from ...objective.policy import POLICY_SCHEMA, PolicyProblem, pack_problem, unpack_problem
from ...objective.values import copied
from ..shared import gradient_coefs, refuse_double_backward, scale_kept
from ..tree_rows import added_branches, extra_rows, host_row, to_tokens
from . import engine
from .cache import cached_plan
from .gradients import Gradients, start_gradients
from .head import Head
from .logps import logps
from .ops import HeadCall, is_frozen, register_head_op
from .plan import Group, LinearPlan, make_policy_plan
from .reductions import logps_with_reductions
from .settings import LinearCall, LinearSettings
from .tree_policy import SharedTokens, shared_tokens


def _linear_policy_fwd(call: HeadCall, host_row, *packed):
    head, problem = call.head(), unpack_problem(packed, call.backend)
    units, products, num_rows = problem.segments, call.products(), call.rows.shape[0]
    row = None if host_row is None else host_row.numpy()
    offsets = None if units is None else units.host_offsets

    def make() -> LinearPlan:
        return make_policy_plan(None if offsets is None else offsets.numpy(), num_rows, products, row)

    plan = cached_plan(make, call.host_step_offsets, offsets, "policy", *vars(products).values())
    gradients = start_gradients(head, plan, call.hidden_shape, call.hidden.dtype, call.accum_dtype)
    rows = call.gathered(plan)
    shared = None if row is None else shared_tokens(plan, problem, row, call.labels.device)
    tokens, entropy = run_policy(head, rows, plan, problem, shared, gradients)
    return rows.restore(tokens), rows.restore(entropy) if len(entropy) else entropy, *call.results(head, gradients)


def _linear_policy_fwd_fake(call: HeadCall, host_row, *packed):
    entropy_coef = packed[-1]
    return (
        call.weight.new_empty(call.rows.shape, dtype=call.acc_dtype),
        call.weight.new_empty(call.rows.shape if entropy_coef else 0, dtype=call.acc_dtype),
        *call.fake_results(call.hidden.dtype),
    )


linear_policy_fwd = register_head_op(
    "linear_policy_fwd",
    f"Tensor? host_row, {POLICY_SCHEMA}",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_policy_fwd,
    _linear_policy_fwd_fake,
)


def run_policy(
    head: Head,
    rows: engine.Rows,
    plan: LinearPlan,
    problem: PolicyProblem,
    shared: SharedTokens | None,
    gradients: Gradients,
) -> tuple[Tensor, Tensor]:
    """Log-probs (U,) and entropy (U,) or empty, in the plan's order.

    The gradients are of sum(scale * rows) - entropy_coef * sum(scale * entropy).
    """
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

    def of_part(part: PolicyProblem, logps: Tensor, entropy: Tensor) -> Tensor:
        """Of each token the five numbers of its gradient (n, 5), or without an entropy bonus d loss/d logp (n,)."""
        if part.fused:
            return part.evaluate(logps, entropy)[1]
        coef = derivative(part.rows, logps) * part.scale
        if not wants_entropy:
            return coef
        d_entropy = -part.entropy_coef * part.scale
        return gradient_coefs(entropy, None, coef, d_entropy, None, None)

    def coefs_of(number: int, group: Group) -> Tensor:
        """The same of each row of a group."""
        if shared is not None:
            return shared.coefs(number, group, of_part, tokens, entropy)
        span = slice(group.start, group.end)
        return of_part(problem.part(group.start, group.end), tokens[span], entropy[span])

    def backward(start: int, end: int, chunk: engine.Chunk, coefs: Tensor) -> None:
        if wants_entropy:
            head.reductions_to_gradient(chunk.logits, chunk.labels, lse[start:end], None, lse[:0], coefs)
        else:
            head.to_gradient(chunk.logits, chunk.labels, lse[start:end], coefs)
        gradients.add(head, chunk.logits, chunk.hidden, chunk.places)

    for number, group in enumerate(plan.groups):
        in_buffer = None
        for start, end in group.chunks:
            in_buffer = forward(start, end)
        if group.kind == "logps":
            continue
        coefs = coefs_of(number, group)
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
    busy, places = _places(np.flatnonzero(~problem.idle), layout)
    some = _only(call, busy, places)
    loss, values, _ = _policy(some, problem.only(busy, places, some.layout.step_offsets))
    tokens = values.new_full((layout.num_rows,), torch.nan).index_copy(0, places, values.detach())
    if problem.skipped is None:  # one product for rows that need no gradient
        idle, (known, source) = np.flatnonzero(problem.idle), _known(layout, busy, problem.idle)
        if len(known):  # tokens of a tree whose rows others have
            tokens = tokens.index_copy(0, _places(known, layout)[1], tokens[_places(source, layout)[1]])
            idle = np.setdiff1d(idle, known)
        idle, places = _places(idle, layout)
        rest = _only(call, idle, places)
        with torch.no_grad():
            values = logps(replace(rest, settings=replace(rest.settings, record=False)))[0]
        tokens.index_copy_(0, places, values)
        loss = loss + 0 * values.sum()  # what is not finite shows
    return loss, tokens, None


def _places(kept: np.ndarray, layout: StepLayout) -> tuple[np.ndarray, Tensor]:
    """Tokens (n,), on the host and on the device."""
    return kept, copied(torch.from_numpy(kept), layout.device)


def _known(layout: StepLayout, busy: np.ndarray, idle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Idle tokens whose row a busy token has too, and such a token for each."""
    row = host_row(layout)
    if row is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    of_row = np.full(layout.rows.shape[0], -1, np.int64)
    of_row[row.numpy()[busy]] = busy
    source = np.where(idle, of_row[row.numpy()], -1)
    known = np.flatnonzero(source >= 0)
    return known, source[known]


def _only(call: LinearCall, kept: np.ndarray, places: Tensor) -> LinearCall:
    """The call for some tokens of its layout."""
    layout = call.layout
    offsets = torch.from_numpy(offsets_among(layout.host_step_offsets.numpy(), kept))
    used, rows, tree = kept, places, layout.tree_rows
    if tree is not None:
        used, tree = rows_among(tree, kept)
        rows, tree = _places(used, layout)[1], tree.to(layout.device)
    some = replace(
        layout, rows=layout.rows[rows], labels=layout.labels[rows], step_of_row=layout.step_of_row[places],
        weights=None if layout.weights is None else layout.weights[places], host_step_offsets=offsets,
        step_offsets=copied(offsets.to(torch.int32), layout.device), tree_rows=tree,
        kept=None if layout.kept is None else layout.kept.of_rows(used),
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
        needs, extra = settings.needs(ctx), extra_rows(layout)
        tokens, entropy, d_hidden, d_weight, d_bias = linear_policy_fwd(
            *settings.op_args(
                hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, needs, extra, layout.kept
            ),
            host_row(layout),
            *pack_problem(problem),
        )
        tokens, entropy = to_tokens(tokens, layout), to_tokens(entropy, layout) if len(entropy) else entropy
        if any(needs):
            d_hidden = added_branches(d_hidden, layout) if needs[0] else d_hidden
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
