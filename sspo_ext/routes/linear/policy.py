"""linear_step_policy_loss: the policy losses from hidden states and the LM head, without ever storing the logits.

What couples tokens is at most a ratio's segment: normalisers are constants of the layout. So the rows of whole segments
share a chunk, the loss's derivative is known while the chunk's logits are there, and a trained head costs three GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.ops import register
from ...formulas.dual import Dual
from ...layout.steps import StepLayout
from ...objective.policy import PolicyProblem, Segments
from ..shared import gradient_coefs, refuse_double_backward, scale_kept
from . import engine
from .gradients import Gradients, start_gradients
from .head import Head, accumulator
from .ops import _HEAD, _gradients
from .plan import LinearPlan, make_policy_plan, rows_per_chunk
from .settings import LinearSettings
from .shards import VocabShard


def _linear_policy_fwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, unit_offsets, unit_of_row, host_unit_offsets, step_offsets, advantage,
    old, ref, scale, formula, options, length_normalize, kl_estimator, kl_coef, entropy_coef,
):  # fmt: skip
    shard = VocabShard(tp_group, vocab_start, weight.shape[0]) if tp_group else None
    head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), a, c, backend, shard)
    plan = make_policy_plan(
        None if host_unit_offsets is None else host_unit_offsets.numpy(),
        num_rows=rows.shape[0],
        vocab=head.vocab,
        hidden=weight.shape[1],
        dtype=dtype,
        chunk_rows=rows_per_chunk(vocab_rows, dtype, chunk_bytes or None, weight.device.type),
        hidden_gradient=needs[0],
        weight_gradient=needs[1],
        bias_gradient=needs[2],
    )
    gradients = start_gradients(head, plan, hidden, hidden.dtype, accum_dtype)
    scored = engine.Rows(hidden, rows, labels, None, plan, dtype)
    segments = None if unit_offsets is None else Segments(unit_offsets, unit_of_row, host_unit_offsets)
    problem = PolicyProblem(
        formula, tuple(options), kl_estimator, kl_coef, entropy_coef, length_normalize, advantage, old, ref, scale,
        scale.new_ones(()), segments, step_offsets, backend,
    )  # fmt: skip
    tokens, entropy = run_policy(head, scored, plan, problem, gradients)
    return tokens, entropy, *_gradients(head, gradients, grad_dtype)


def _linear_policy_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, *args,
):  # fmt: skip
    acc = accumulator(dtype)
    return (
        weight.new_empty(rows.shape, dtype=acc),
        weight.new_empty(rows.shape if args[-1] else 0, dtype=acc),
        hidden.new_empty(hidden.shape) if needs[0] else weight.new_empty(0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=grad_dtype),
        weight.new_empty(weight.shape[:1] if needs[2] else 0, dtype=acc),
    )


linear_policy_fwd = register(
    "linear_policy_fwd",
    f"({_HEAD}, Tensor? unit_offsets, Tensor? unit_of_row, Tensor? host_unit_offsets, Tensor step_offsets, "
    "Tensor advantage, Tensor? old, Tensor? ref, Tensor scale, str formula, float[] options, bool length_normalize, "
    "str kl_estimator, float kl_coef, float entropy_coef) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_policy_fwd,
    _linear_policy_fwd_fake,
)


def run_policy(
    head: Head, rows: engine.Rows, plan: LinearPlan, problem: PolicyProblem, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """tokens (N,), entropy (N,) or empty; gradients of sum(scale * rows) - entropy_coef * sum(scale * entropy)."""
    device, wants_entropy = rows.labels.device, problem.entropy_coef != 0
    tokens = torch.empty(plan.num_rows, dtype=head.acc_dtype, device=device)
    lse = torch.empty_like(tokens, dtype=torch.float64)
    entropy = torch.empty(plan.num_rows * wants_entropy, dtype=head.acc_dtype, device=device)
    head.allocate(plan)

    def forward(start: int, end: int) -> tuple:
        hidden, labels, places = rows.chunk(start, end)
        logits = head.logits(hidden)
        if wants_entropy:
            parts = head.reductions(logits, labels, None, sum_p2=False)
            tokens[start:end], lse[start:end], entropy[start:end] = parts[:3]
        else:
            tokens[start:end], lse[start:end] = head.logps(logits, labels)
        return hidden, labels, places, logits

    def backward(start: int, end: int, chunk: tuple, coef: Tensor) -> None:
        hidden, labels, places, logits = chunk
        if wants_entropy:
            d_entropy = -problem.entropy_coef * problem.scale[start:end]
            coefs = gradient_coefs(entropy[start:end], None, coef, d_entropy, None, None)
            head.reductions_to_gradient(logits, labels, lse[start:end], None, lse[:0], coefs)
        else:
            head.to_gradient(logits, labels, lse[start:end], coef)
        gradients.add(head, logits, hidden, places)

    for group in plan.groups:
        for span in group.chunks:
            chunk = forward(*span)
        if group.kind == "logps":
            continue
        part = problem.part(group.start, group.end)
        coef = part.rows(Dual.variable(tokens[group.start : group.end])).slope * part.scale
        for i, (start, end) in enumerate(reversed(group.chunks)):
            if i:  # the last chunk's logits are still in the buffer
                hidden, labels, places = rows.chunk(start, end)
                chunk = hidden, labels, places, head.logits(hidden)
            backward(start, end, chunk, coef[start - group.start : end - group.start])
    return tokens, entropy


class LinearPolicyRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> loss (), tokens (N,), entropy (N,), with gradients from forward."""

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
        scale = problem.scale * problem.norm
        units = problem.segments
        tokens, entropy, d_hidden, d_weight, d_bias = linear_policy_fwd(
            hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, needs,
            *settings.op_args(weight), *((None,) * 3 if units is None else (units.offsets, units.of_row,
            units.host_offsets)), layout.step_offsets, problem.advantage, problem.old, problem.ref, scale, problem.formula,
            list(problem.options), problem.length_normalize, problem.kl_estimator, problem.kl_coef,
            problem.entropy_coef,
        )  # fmt: skip
        if any(needs):
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
            ctx.needs, ctx.settings = needs, settings
            ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(tokens, entropy)
        ctx.set_materialize_grads(False)
        return problem.loss(tokens, entropy), tokens, entropy

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 6
        refuse_double_backward()
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        needs, settings = ctx.needs, ctx.settings
        return (
            scale_kept(d_hidden, d_loss) if needs[0] else None,
            settings.deliver_weight(d_weight, d_loss) if needs[1] else None,
            (d_bias * d_loss).to(ctx.bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )
