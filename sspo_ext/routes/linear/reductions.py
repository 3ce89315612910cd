# SPDX-License-Identifier: Apache-2.0
"""The linear route with entropy, sum of squared probabilities and KL from a reference: ops, and the autograd.Function.

A row's gradient is known only in backward and is no multiple of one direction. So backward computes the logits again,
a chunk at a time, even with a frozen head. The reference's logits are a second product into a second buffer; the two
buffers share the budget. `logps_with_reductions` chooses between kernels and reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import backends
from ..._checks import check_device, check_float, check_shape, check_tensor
from ...backends import reference
from ...layout.steps import StepLayout
from ...objective.sums import StepLogps, step_sums, with_reductions
from ..shared import gradient_coefs, refuse_double_backward
from ..tree_rows import added_branches, extra_rows, of_tokens, plan_offsets
from . import engine
from .head import Head
from .ops import HeadCall, Work, register_head_op, set_up
from .reference import reference_logits
from .settings import LinearCall, LinearSettings
from .shards import local_part

_REFERENCE = "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"


def _set_up_both(
    call: HeadCall, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> tuple[Work, engine.Reference | None]:
    if ref_hidden is None:
        return set_up(call, buffers=1), None
    assert ref_weight is not None
    work = set_up(call, buffers=2)
    bias = None if ref_bias is None else ref_bias.to(call.dtype)
    head = Head(ref_weight.to(call.dtype), bias, call.a, call.c, call.backend, None, call.batch_invariant)
    rows = engine.Rows(ref_hidden, call.rows, call.labels, call.rows, None, work.plan, call.dtype, call.kept)
    return work, engine.Reference(head, rows)


def _linear_reductions_fwd(call: HeadCall, ref_hidden, ref_weight, ref_bias):
    work, ref = _set_up_both(call, ref_hidden, ref_weight, ref_bias)
    return engine.run_reductions(work.head, work.rows, work.plan, ref)


def _linear_reductions_fwd_fake(call: HeadCall, ref_hidden, *reference):
    acc, N = call.acc_dtype, call.rows.shape[0]
    M = 0 if ref_hidden is None else N
    sizes = ((N, acc), (N, torch.float64), (N, acc), (N, acc), (M, acc), (M, torch.float64))
    return tuple(call.weight.new_empty(size, dtype=d) for size, d in sizes)


def _linear_reductions_bwd(call: HeadCall, ref_hidden, ref_weight, ref_bias, lse, ref_lse, coefs):
    work, ref = _set_up_both(call, ref_hidden, ref_weight, ref_bias)
    engine.run_reductions_backward(work.head, work.rows, work.plan, ref, lse, ref_lse, coefs, work.gradients)
    return call.results(work.head, work.gradients)


linear_reductions_fwd = register_head_op(
    "linear_reductions_fwd",
    _REFERENCE,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_reductions_fwd,
    _linear_reductions_fwd_fake,
)

linear_reductions_bwd = register_head_op(
    "linear_reductions_bwd",
    f"{_REFERENCE}, Tensor lse, Tensor ref_lse, Tensor coefs",
    "(Tensor, Tensor, Tensor)",
    _linear_reductions_bwd,
    lambda call, *args: call.fake_results(),
)


class KlReference(NamedTuple):
    """The model that kl is measured from; constants."""

    hidden: Tensor  # (N0, H')
    weight: Tensor  # (V, H')
    bias: Tensor | None  # (V,)


def logps_with_reductions(call: LinearCall, ref: KlReference | None, *, entropy: bool, sum_p2: bool) -> StepLogps:
    """Step log-probs with the reductions that are asked for, and with kl if there is a reference."""
    layout, settings = call.layout, call.settings
    name = backends.with_reductions(settings.requested, settings.backend)
    for argument, given in (
        ("tp_group", settings.tp_group != ""), ("weight_grad", settings.weight_grad is not None),
        ("batch_invariant", settings.batch_invariant),
    ):  # fmt: skip
        if name != settings.backend and given:
            raise ValueError(
                f"{argument}: {settings.backend!r} has no entropy, sum_p2 or kl, and 'reference' no {argument}"
            )
    if name == "reference":
        logits = reference_logits(call.hidden, call.weight, call.bias, layout, settings)
        ref_logits = None if ref is None else reference_logits(*ref, layout, settings)
        rows = torch.arange(layout.rows.shape[0], device=call.hidden.device)
        tokens = reference.token_logps(logits, rows, layout.labels, settings.a, settings.c)
        values = reference.row_reductions(logits, rows, ref_logits, settings.a, settings.c)
    else:
        tokens, *values = LinearReductionsRoute.apply(call.hidden, call.weight, call.bias, ref, layout, settings)
    wanted = (entropy, sum_p2, ref is not None)
    tokens = of_tokens(tokens, layout)
    values = [v if v is None or not len(v) else of_tokens(v, layout) for v in values]
    return with_reductions(tokens, step_sums(tokens, layout, name), layout, values, wanted)


def kl_reference(
    call: LinearCall, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> KlReference | None:
    """The reference from the public arguments, checked; its head is the policy's if none is given."""
    weight, bias, layout = call.weight, call.bias, call.layout
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError(
                "kl_ref_hidden: expected the reference's hidden states beside its weight or bias, got None"
            )
        return None
    if ref_weight is None and ref_bias is None:
        ref_weight, ref_bias = weight, bias
    check_float("kl_ref_hidden", ref_hidden, ndim=(2, 3))
    ref_weight = local_part(check_tensor("kl_ref_weight", ref_weight))
    check_float("kl_ref_weight", ref_weight, ndim=2)
    check_shape("kl_ref_weight", ref_weight, (weight.shape[0], ref_hidden.shape[-1]))
    batch, length = layout.shape
    flat = ref_hidden.ndim == 2 and batch == 1
    expected = (length, ref_hidden.shape[-1]) if flat else (batch, length, ref_hidden.shape[-1])
    check_shape("kl_ref_hidden", ref_hidden, expected)
    if ref_bias is not None:
        ref_bias = local_part(check_tensor("kl_ref_bias", ref_bias)).detach()
        check_float("kl_ref_bias", ref_bias)
        check_shape("kl_ref_bias", ref_bias, (weight.shape[0],))
    for name, value in (("hidden", ref_hidden), ("weight", ref_weight), ("bias", ref_bias)):
        if value is not None:
            check_device(f"kl_ref_{name}", value, weight.device, "the weight")
    return KlReference(ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]), ref_weight.detach(), ref_bias)


class LinearReductionsRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> tokens, entropy, sum_p2, kl, (N,) each.

    Without a reference kl is empty.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref: KlReference | None,
        layout: StepLayout,
        settings: LinearSettings,
    ):
        needs = settings.needs(ctx)
        args, extra = (hidden, weight, bias, layout.rows, layout.labels, plan_offsets(layout)), extra_rows(layout)
        ref_args = (None, None, None) if ref is None else tuple(ref)
        tokens, lse, entropy, sum_p2, kl, ref_lse = linear_reductions_fwd(
            *settings.op_args(*args, [False] * 3, extra, layout.kept), *ref_args
        )
        if any(needs):
            ctx.save_for_backward(*args, *ref_args, lse, ref_lse, entropy, sum_p2, extra)
        ctx.needs, ctx.settings, ctx.layout, ctx.dtypes = (
            needs,
            settings,
            layout,
            (hidden.dtype, None if bias is None else bias.dtype),
        )
        if ref is None:
            ctx.mark_non_differentiable(kl)
        ctx.set_materialize_grads(False)
        return tokens, entropy, sum_p2, kl

    @staticmethod
    def backward(ctx, *upstream):
        d_tokens, d_entropy, d_sum_p2, d_kl = upstream
        if all(d is None for d in upstream):
            return (None,) * 6
        refuse_double_backward()
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        *args, lse, ref_lse, entropy, sum_p2, extra = ctx.saved_tensors
        if args[6] is None:
            d_kl = None  # under torch.compile the empty output gets an empty gradient
        args, ref = args[:6], args[6:] if d_kl is not None else (None, None, None)
        coefs = gradient_coefs(entropy, sum_p2, d_tokens, d_entropy, d_sum_p2, d_kl)
        d_hidden, d_weight, d_bias = linear_reductions_bwd(
            *settings.op_args(*args, needs, extra, ctx.layout.kept), *ref, lse, ref_lse, coefs
        )
        return (
            added_branches(d_hidden, ctx.layout).to(dtype) if needs[0] else None,
            settings.deliver_weight(d_weight, None) if needs[1] else None,
            d_bias.to(bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )
