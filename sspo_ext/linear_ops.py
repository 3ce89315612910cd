"""Private torch.library ops of the linear route. Each plans on the host from CPU tensors, then runs the chunked engine.

`needs` says which gradients to accumulate: hidden, weight, bias. What was not asked for comes back empty. GEMMs run in `dtype`; the
weight's and bias's gradients accumulate over chunks in `accum_dtype` and are cast once, to `grad_dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear_engine as engine
from .ops import register

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor labels, Tensor host_step_offsets, bool[] needs, "
    "float a, float c, ScalarType dtype, ScalarType accum_dtype, ScalarType grad_dtype, int chunk_bytes, str tp_group, "
    "int vocab_start, str backend"
)


def _setup(hidden, weight, bias, rows, labels, token_weights, host_step_offsets, host_pair_index, needs, a, c, dtype, accum_dtype,
           chunk_bytes, tp_group, vocab_start, backend):  # fmt: skip
    head = engine.prepare_head(weight, bias, a, c, backend, dtype, chunk_bytes, tp_group, vocab_start)
    plan = engine.plan_call(host_step_offsets, host_pair_index, head, weight.shape[1], tuple(needs))
    gradients = engine.start_gradients(head, plan, needs[2], accum_dtype)
    return head, plan, engine.Rows(hidden, rows, labels, token_weights, plan, dtype), gradients


def _gradients(
    head: engine.Head, rows: engine.Rows, gradients: engine.Gradients, grad_dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H) in the layout's row order, (V, H), (V,), each empty when not asked for."""
    empty = head.weight.new_empty(0, dtype=grad_dtype)
    d_rows = head.weight.new_empty(0)
    if gradients.hidden is not None:
        d_rows = rows.restore(gradients.hidden)
        if head.shard is not None:
            d_rows = head.shard.all_reduce(d_rows)
    return (
        d_rows,
        empty if gradients.weight is None else gradients.weight.total.to(grad_dtype),
        empty if gradients.bias is None else gradients.bias.to(grad_dtype),
    )


def _linear_pref_fwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes, tp_group,
    vocab_start, backend, token_weights, ref, host_pair_index, pair_weights, pair_margins, pair_labels, scale, loss_head, options, label,
):  # fmt: skip
    head, plan, scored, gradients = _setup(
        hidden, weight, bias, rows, labels, token_weights, host_step_offsets, host_pair_index, needs, a, c, dtype, accum_dtype,
        chunk_bytes, tp_group, vocab_start, backend,
    )  # fmt: skip
    problem = engine.PairProblem(
        token_weights, ref, pair_weights, pair_margins, pair_labels, scale, loss_head, options, label,
        host_step_offsets.numpy(), host_pair_index.numpy(),
    )  # fmt: skip
    loss, sums, tokens, pair_losses, coef = engine.run_pref(head, scored, plan, problem, gradients)
    return loss, sums, tokens, pair_losses, coef, *_gradients(head, scored, gradients, grad_dtype)


def _linear_logps_fwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes, tp_group,
    vocab_start, backend,
):  # fmt: skip
    head, plan, scored, gradients = _setup(
        hidden, weight, bias, rows, labels, None, host_step_offsets, _no_pairs(), needs, a, c, dtype, accum_dtype, chunk_bytes,
        tp_group, vocab_start, backend,
    )  # fmt: skip
    tokens, lse = engine.run_logps(head, scored, plan, gradients)
    return tokens, lse, _gradients(head, scored, gradients, grad_dtype)[0]


def _linear_logps_bwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes, tp_group,
    vocab_start, backend, lse, coef,
):  # fmt: skip
    # d/dlogp is known row by row here, so rows keep their order whatever is asked for
    head = engine.prepare_head(weight, bias, a, c, backend, dtype, chunk_bytes, tp_group, vocab_start)
    plan = engine.plan_call(host_step_offsets, _no_pairs(), head, weight.shape[1], (True, False, False))
    plan = engine.with_gradients(plan, hidden=needs[0], weight=needs[1])
    gradients = engine.start_gradients(head, plan, needs[2], accum_dtype)
    scored = engine.Rows(hidden, rows, labels, None, plan, dtype)
    engine.run_backward(head, scored, plan, lse, coef, gradients)
    return _gradients(head, scored, gradients, grad_dtype)


def _no_pairs() -> Tensor:
    return torch.zeros((0, 2), dtype=torch.int64)


def _fake_gradients(weight, rows, needs, dtype, grad_dtype):
    empty = weight.new_empty(0, dtype=grad_dtype)
    return (
        weight.new_empty((rows.shape[0], weight.shape[1]) if needs[0] else (0,), dtype=dtype),
        weight.new_empty(weight.shape, dtype=grad_dtype) if needs[1] else empty,
        weight.new_empty(weight.shape[:1], dtype=grad_dtype) if needs[2] else empty,
    )


def _linear_pref_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes, tp_group,
    vocab_start, backend, token_weights, ref, host_pair_index, *args,
):  # fmt: skip
    acc = engine.accumulator(dtype)
    frozen = needs[0] and not needs[1] and not needs[2]
    sizes = (
        (),
        host_step_offsets.shape[0] - 1,
        rows.shape[0],
        host_pair_index.shape[0],
        rows.shape[0] if frozen else 0,
    )
    return *(weight.new_empty(size, dtype=acc) for size in sizes), *_fake_gradients(
        weight, rows, needs, dtype, grad_dtype
    )


def _linear_logps_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, *args
):  # fmt: skip
    tokens = weight.new_empty(rows.shape, dtype=engine.accumulator(dtype))
    return (
        tokens,
        torch.empty_like(tokens, dtype=torch.float64),
        _fake_gradients(weight, rows, needs, dtype, grad_dtype)[0],
    )


def _linear_logps_bwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, *args
):  # fmt: skip
    return _fake_gradients(weight, rows, needs, dtype, grad_dtype)


linear_pref_fwd = register(
    "linear_pref_fwd",
    f"({_HEAD}, Tensor? token_weights, Tensor? ref, Tensor host_pair_index, Tensor? pair_weights, Tensor? pair_margins, "
    "Tensor? pair_labels, Tensor scale, str loss_head, float[] options, float label) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_pref_fwd,
    _linear_pref_fwd_fake,
)
linear_logps_fwd = register(
    "linear_logps_fwd", f"({_HEAD}) -> (Tensor, Tensor, Tensor)", _linear_logps_fwd, _linear_logps_fwd_fake
)
linear_logps_bwd = register(
    "linear_logps_bwd",
    f"({_HEAD}, Tensor lse, Tensor coef) -> (Tensor, Tensor, Tensor)",
    _linear_logps_bwd,
    _linear_logps_bwd_fake,
)
