"""linear_step_policy_loss: the policy losses from hidden states and the LM head, without ever storing the logits.

What couples tokens is at most a ratio's segment: normalisers are constants of the layout. So the rows of whole segments
share a chunk, the loss's derivative is known while the chunk's logits are there, and a trained head costs three GEMMs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import backends
from . import linear_engine as engine
from .autograd import refuse_double_backward, scale_kept
from .dual import Dual
from .layout import StepLayout
from .linear import LinearSettings, _prepare, linear_step_logps
from .linear_ops import _HEAD, _gradients, is_frozen
from .logps import StepLogps
from .ops import register
from .plan import Group, LinearPlan, cut_evenly, plan_for, rows_per_chunk
from .policy import PolicyProblem, Segments, segment_sums
from .policy_losses import StepPolicyOutput, policy_output, policy_problem, segments_of
from .reductions import gradient_coefs
from .tensor_parallel import VocabShard


def make_policy_plan(
    host_unit_offsets: np.ndarray | None,  # (U + 1,) rows of the units, one after the other; None: each row is one
    *,
    num_rows: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    chunk_rows: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> LinearPlan:
    """Groups of whole units that fit in a chunk, in the layout's order; a larger unit stands alone and is computed
    twice."""
    nothing = np.zeros(0, np.int64)

    def group(kind: str, start: int, end: int) -> Group:
        return Group(kind, start, end, cut_evenly(start, end, chunk_rows), nothing, nothing)

    if not (hidden_gradient or weight_gradient or bias_gradient):
        groups = [group("logps", 0, num_rows)]
    elif host_unit_offsets is None:
        groups = [group("complete", start, end) for start, end in cut_evenly(0, num_rows, chunk_rows)]
    else:
        groups, start = [], 0
        ends = host_unit_offsets[1:].tolist()
        for end, after in zip(ends, [*ends, None][1:], strict=True):
            # close the group when it is too large already, or the next unit would make it so
            if end > start and (after is None or after - start > chunk_rows):
                groups.append(group("complete" if end - start <= chunk_rows else "recompute", start, end))
                start = end
    return LinearPlan(
        None, groups, chunk_rows, num_rows, vocab, hidden, dtype, hidden_gradient, weight_gradient, bias_gradient
    )


def policy_plan(
    layout: StepLayout,
    *,
    importance_sampling_level: str = "token",
    vocab: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = False,
) -> LinearPlan:
    """What `linear_step_policy_loss` will do with a trained head: rows, chunks, GEMMs, FLOPs, bytes. Print it."""
    if dtype == torch.float16:
        return plan_for(
            layout, None, vocab=vocab, hidden=hidden, dtype=dtype, chunk_bytes=chunk_bytes,
            hidden_gradient=hidden_gradient, weight_gradient=weight_gradient, bias_gradient=bias_gradient,
            reductions=False,
        )  # fmt: skip
    offsets = None
    if importance_sampling_level != "token":
        offsets = segments_of(layout, importance_sampling_level).host_offsets.numpy()
    return make_policy_plan(
        offsets, num_rows=layout.num_rows, vocab=vocab, hidden=hidden, dtype=dtype,
        chunk_rows=rows_per_chunk(vocab, dtype, chunk_bytes, layout.device.type), hidden_gradient=hidden_gradient,
        weight_gradient=weight_gradient, bias_gradient=bias_gradient,
    )  # fmt: skip


def _linear_policy_fwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, unit_offsets, unit_of_row, host_unit_offsets, step_offsets, advantage,
    old, ref, scale, loss_head, options, length_normalize, kl_estimator, kl_coef, entropy_coef,
):  # fmt: skip
    shard = VocabShard(tp_group, vocab_start, weight.shape[0]) if tp_group else None
    head = engine.Head(weight.to(dtype), None if bias is None else bias.to(dtype), a, c, backend, shard)
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
    gradients = engine.start_gradients(head, plan, hidden, hidden.dtype, accum_dtype)
    scored = engine.Rows(hidden, rows, labels, None, plan, dtype)
    segments = None if unit_offsets is None else Segments(unit_offsets, unit_of_row, host_unit_offsets)
    problem = PolicyProblem(
        loss_head, tuple(options), kl_estimator, kl_coef, entropy_coef, length_normalize, advantage, old, ref, scale,
        scale.new_ones(()), segments, step_offsets, backend,
    )  # fmt: skip
    tokens, entropy = run_policy(head, scored, plan, problem, gradients)
    return tokens, entropy, *_gradients(head, gradients, grad_dtype)


def _linear_policy_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, *args,
):  # fmt: skip
    acc = engine.accumulator(dtype)
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
    "Tensor advantage, Tensor? old, Tensor? ref, Tensor scale, str loss_head, float[] options, bool length_normalize, "
    "str kl_estimator, float kl_coef, float entropy_coef) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_policy_fwd,
    _linear_policy_fwd_fake,
)


def run_policy(
    head: engine.Head, rows: engine.Rows, plan: LinearPlan, problem: PolicyProblem, gradients: engine.Gradients
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
            units.host_offsets)), layout.step_offsets, problem.advantage, problem.old, problem.ref, scale, problem.head,
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


def linear_step_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    layout: StepLayout,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    old: StepLogps | Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    loss_type: str = "reinforce",
    importance_sampling_level: str = "token",
    length_normalize: bool = True,
    prob_threshold: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str = "token",
    num_items: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    tp_group=None,
    backend: str = "auto",
    **loss_options: float | None,
) -> StepPolicyOutput:
    """`step_policy_loss(hidden @ weight.T + bias, layout, advantages)`, without ever storing the (N, V) logits.

    Only scored rows enter a GEMM. 1 GEMM (N x H x V) without gradients, 2 with a frozen head, 3 with a trained one:
    what ties tokens together is at most the ratio of a step or sequence, and one larger than a chunk costs 4 (3 with a
    frozen head and an entropy bonus), as it does in float16, whose gradients wait for the loss scale.
    `sspo_ext.linear_policy.policy_plan(layout, ...)` prints it. The losses' options are as in `step_policy_loss`, those
    of the linear route as in `linear_step_pref_loss`.

    Example::

        >>> hidden = model.model(input_ids).last_hidden_state
        >>> out = linear_step_policy_loss(hidden, model.lm_head.weight, layout, advantages, old=old, loss_type="ppo")
        >>> out.loss.backward()
    """
    if token_weights is not None and isinstance(layout, StepLayout):
        layout = layout.with_row_weights(token_weights)
    flat, local, local_bias, settings = _prepare(
        hidden, weight, bias, layout, temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad,
        tp_group, backend,
    )  # fmt: skip
    problem = policy_problem(
        layout, engine.accumulator(settings.dtype), settings.backend, advantages, old, ref, loss_type,
        importance_sampling_level, length_normalize, prob_threshold, kl_coef, kl_estimator, entropy_coef, aggregation,
        num_items, loss_options,
    )  # fmt: skip
    wants_entropy = entropy_coef != 0
    needs = [settings.record and t is not None and t.requires_grad for t in (flat, local, local_bias)]
    # float16 waits for the loss scale, which is known in backward
    in_forward = any(needs) and (wants_entropy or not is_frozen(needs)) and settings.dtype != torch.float16
    name = backends.with_reductions(backend, settings.backend) if wants_entropy else settings.backend
    if name == "reference" or not in_forward:
        scored = linear_step_logps(
            hidden, weight, layout, bias=bias, entropy=wants_entropy, temperature=temperature,
            logit_softcap=logit_softcap, logit_scale=logit_scale, chunk_bytes=chunk_bytes, accum_dtype=accum_dtype,
            weight_grad=weight_grad, tp_group=tp_group, backend=backend,
        )  # fmt: skip
        return policy_output(scored, layout, problem)
    loss, tokens, entropy = LinearPolicyRoute.apply(flat, local, local_bias, layout, problem, settings)
    with torch.no_grad():
        weighted = tokens if layout.weights is None else tokens * layout.weights.to(tokens.dtype)
        sums = segment_sums(weighted, layout.step_offsets, layout.step_of_row, settings.backend)
    return StepPolicyOutput(loss, tokens, sums, layout, problem, entropy if wants_entropy else None)
