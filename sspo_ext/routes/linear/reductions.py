"""The linear route with entropy, sum of squared probabilities and KL from a reference: ops, and the autograd.Function.

The gradient of a row is known only in backward and is no multiple of one direction, so backward computes the logits
again, a chunk at a time, with a frozen head too. The reference's logits are a second product into a second buffer; the
two share the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ..._checks import check_device, check_float, check_shape
from ...backends import reference
from ...backends.ops import register
from ...layout.steps import StepLayout
from ...objective.sums import StepLogps, StepSums
from ..shared import gradient_coefs, refuse_double_backward
from . import engine
from .head import Head, accumulator
from .ops import _HEAD, _fake_gradients, _gradients, _setup
from .reference import reference_logits
from .settings import LinearSettings
from .shards import local_part

_REFERENCE = "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"


def _setup_both(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, ref_hidden, ref_weight, ref_bias,
):  # fmt: skip
    head, plan, scored, gradients = _setup(
        hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
        tp_group, vocab_start, vocab_rows, backend, None, None, 1 if ref_hidden is None else 2,
    )  # fmt: skip
    ref = None
    if ref_hidden is not None:
        ref_bias = None if ref_bias is None else ref_bias.to(dtype)
        ref_head = Head(ref_weight.to(dtype), ref_bias, a, c, backend, None)
        ref = engine.Reference(ref_head, engine.Rows(ref_hidden, rows, labels, None, plan, dtype))
    return head, scored, plan, ref, gradients


def _linear_reductions_fwd(*args):
    head, scored, plan, ref, _ = _setup_both(*args)
    return engine.run_reductions(head, scored, plan, ref)


def _linear_reductions_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, ref_hidden, *args,
):  # fmt: skip
    acc, N = accumulator(dtype), rows.shape[0]
    M = 0 if ref_hidden is None else N
    sizes = ((N, acc), (N, torch.float64), (N, acc), (N, acc), (M, acc), (M, torch.float64))
    return tuple(weight.new_empty(size, dtype=d) for size, d in sizes)


def _linear_reductions_bwd(*args):
    *args, lse, ref_lse, coefs = args
    head, scored, plan, ref, gradients = _setup_both(*args)
    engine.run_reductions_backward(head, scored, plan, ref, lse, ref_lse, coefs, gradients)
    grad_dtype = args[11]
    return _gradients(head, gradients, grad_dtype)


def _linear_reductions_bwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, *args
):
    return _fake_gradients(hidden, weight, needs, dtype, grad_dtype)


linear_reductions_fwd = register(
    "linear_reductions_fwd",
    f"({_HEAD}, {_REFERENCE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_reductions_fwd,
    _linear_reductions_fwd_fake,
)

linear_reductions_bwd = register(
    "linear_reductions_bwd",
    f"({_HEAD}, {_REFERENCE}, Tensor lse, Tensor ref_lse, Tensor coefs) -> (Tensor, Tensor, Tensor)",
    _linear_reductions_bwd,
    _linear_reductions_bwd_fake,
)


class LinearReductionsRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> tokens, entropy, sum_p2, kl, (N,) each; kl is empty without a
    reference, whose hidden states (N0, H'), weight (V, H') and bias are constants."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref: tuple[Tensor | None, Tensor | None, Tensor | None],
        layout: StepLayout,
        settings: LinearSettings,
    ):
        needs = settings.needs(ctx)
        args = (hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets)
        tokens, lse, entropy, sum_p2, kl, ref_lse = linear_reductions_fwd(
            *args, [False] * 3, *settings.op_args(weight), *ref
        )
        if any(needs):
            ctx.save_for_backward(*args, *ref, lse, ref_lse, entropy, sum_p2)
        ctx.needs, ctx.settings, ctx.dtypes = needs, settings, (hidden.dtype, None if bias is None else bias.dtype)
        if ref[0] is None:
            ctx.mark_non_differentiable(kl)
        ctx.set_materialize_grads(False)
        return tokens, entropy, sum_p2, kl

    @staticmethod
    def backward(ctx, d_tokens, d_entropy, d_sum_p2, d_kl):
        upstream = (d_tokens, d_entropy, d_sum_p2, d_kl)
        if all(d is None for d in upstream):
            return (None,) * 6
        refuse_double_backward()
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        *args, lse, ref_lse, entropy, sum_p2 = ctx.saved_tensors
        if args[6] is None:
            d_kl = None  # compiled, the empty output gets an empty gradient
        args, ref = args[:6], args[6:] if d_kl is not None else (None, None, None)
        coefs = gradient_coefs(entropy, sum_p2, d_tokens, d_entropy, d_sum_p2, d_kl)
        d_hidden, d_weight, d_bias = linear_reductions_bwd(
            *args, needs, *settings.op_args(args[1]), *ref, lse, ref_lse, coefs
        )
        return (
            d_hidden.to(dtype) if needs[0] else None,
            settings.deliver_weight(d_weight, coefs.new_ones(())) if needs[1] else None,
            d_bias.to(bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )


def kl_reference(ref_hidden, ref_weight, ref_bias, weight, bias, layout) -> tuple[Tensor | None, ...]:
    """(N0, H') hidden states, (V, H') weight and (V,) bias of the reference; all None without one."""
    if ref_hidden is None:
        return None, None, None
    if ref_weight is None and ref_bias is None:
        ref_weight, ref_bias = weight, bias
    ref_weight, ref_bias = local_part(ref_weight), local_part(ref_bias)
    check_float("kl_ref_hidden", ref_hidden, ndim=(2, 3))
    check_float("kl_ref_weight", ref_weight, ndim=2)
    check_shape("kl_ref_weight", ref_weight, (weight.shape[0], ref_hidden.shape[-1]))
    batch, length = layout.shape
    flat = ref_hidden.ndim == 2 and batch == 1
    expected = (length, ref_hidden.shape[-1]) if flat else (batch, length, ref_hidden.shape[-1])
    check_shape("kl_ref_hidden", ref_hidden, expected)
    if ref_bias is not None:
        check_float("kl_ref_bias", ref_bias)
        check_shape("kl_ref_bias", ref_bias, (weight.shape[0],))
    for name, value in (("hidden", ref_hidden), ("weight", ref_weight), ("bias", ref_bias)):
        if value is not None:
            check_device(f"kl_ref_{name}", value, weight.device, "the weight")
    ref_bias = None if ref_bias is None else ref_bias.detach()
    return ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]), ref_weight.detach(), ref_bias


def linear_reductions(
    hidden, weight, bias, ref, layout, entropy: bool, sum_p2: bool, settings: LinearSettings, requested: str, tp_group
) -> StepLogps:
    name = backends.with_reductions(requested, settings.backend)
    for argument, value in (("tp_group", tp_group), ("weight_grad", settings.weight_grad)):
        if name != settings.backend and value is not None:
            raise ValueError(
                f"{argument}: {settings.backend!r} has no entropy, sum_p2 or kl, and 'reference' no {argument}"
            )
    if name == "reference":
        logits = reference_logits(hidden, weight, bias, layout, settings)
        ref_logits = None if ref[0] is None else reference_logits(*ref, layout, settings)
        rows = torch.arange(layout.num_rows, device=hidden.device)
        tokens = reference.token_logps(logits, rows, layout.labels, settings.a, settings.c)
        values = reference.row_reductions(logits, rows, ref_logits, settings.a, settings.c)
        sums = reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    else:
        tokens, *values = LinearReductionsRoute.apply(hidden, weight, bias, ref, layout, settings)
        sums = StepSums.apply(tokens, layout, name)
    return StepLogps(
        sums, layout.counts, tokens, values[0] if entropy else None, values[1] if sum_p2 else None,
        None if ref[0] is None else values[2],
    )  # fmt: skip
