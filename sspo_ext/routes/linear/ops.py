"""Private torch.library ops of the linear route. Each plans on the host from CPU tensors, then runs the chunked engine.

`needs` says which gradients to accumulate: hidden, weight, bias. What was not asked for comes back empty. GEMMs run in
`dtype`; the weight's gradient accumulates over chunks in `accum_dtype` and is cast once, to `grad_dtype`. `vocab_rows`
is the size of the largest vocabulary shard, so that all ranks cut the same chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.ops import register
from ...objective.pair import unpack_terms
from . import engine
from .gradients import Gradients, start_gradients
from .head import Head, accumulator
from .plan import LinearPlan, make_plan, rows_per_chunk
from .shards import VocabShard

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor labels, Tensor host_step_offsets, bool[] needs, "
    "float a, float c, ScalarType dtype, ScalarType accum_dtype, ScalarType grad_dtype, int chunk_bytes, "
    "str tp_group, int vocab_start, int vocab_rows, str backend"
)


def _setup(
    hidden, weight, bias, rows, labels, offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes, tp_group,
    vocab_start, vocab_rows, backend, token_weights, pair_index, buffers=0,
) -> tuple[Head, LinearPlan, engine.Rows, Gradients]:  # fmt: skip
    # buffers: how many share the budget, where entropy and the like are asked for; 0 where they are not
    shard = VocabShard(tp_group, vocab_start, weight.shape[0]) if tp_group else None
    # a weight of another dtype is copied once a call
    head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), a, c, backend, shard)
    plan = make_plan(
        offsets.numpy(),
        None if pair_index is None else pair_index.numpy(),
        vocab=head.vocab,
        hidden=weight.shape[1],
        dtype=dtype,
        chunk_rows=rows_per_chunk(vocab_rows * max(buffers, 1), dtype, chunk_bytes or None, weight.device.type),
        hidden_gradient=needs[0],
        weight_gradient=needs[1],
        bias_gradient=needs[2],
        reductions=buffers > 0,
    )
    gradients = start_gradients(head, plan, hidden, hidden_gradient_dtype(hidden, needs, dtype), accum_dtype)
    return head, plan, engine.Rows(hidden, rows, labels, token_weights, plan, dtype), gradients


def is_frozen(needs: list[bool]) -> bool:
    """Whether the hidden states alone want a gradient."""
    return needs[0] and not needs[1] and not needs[2]


def hidden_gradient_dtype(hidden: Tensor, needs: list[bool], dtype: torch.dtype) -> torch.dtype:
    """A frozen plan keeps directions, still to be scaled, in the GEMMs' dtype; otherwise rows are final."""
    return dtype if is_frozen(needs) else hidden.dtype


def _gradients(head: Head, gradients: Gradients, grad_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(N0, H), (V, H), (V,), each empty when not asked for."""
    d_weight = head.weight.new_empty(0, dtype=grad_dtype)
    if gradients.weight is not None:
        d_weight = gradients.weight.total.to(grad_dtype)
    return (
        head.weight.new_empty(0) if gradients.hidden is None else gradients.hidden,
        d_weight,
        head.weight.new_empty(0, dtype=head.acc_dtype) if gradients.bias is None else gradients.bias,
    )


def _fake_gradients(hidden, weight, needs, dtype, grad_dtype) -> tuple[Tensor, ...]:
    kept = hidden_gradient_dtype(hidden, needs, dtype)
    return (
        hidden.new_empty(hidden.shape, dtype=kept) if needs[0] else weight.new_empty(0, dtype=dtype),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=grad_dtype),
        weight.new_empty(weight.shape[:1] if needs[2] else 0, dtype=accumulator(dtype)),
    )


def _linear_pref_fwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, token_weights, ref, host_pair_index, pair_weights, pair_margins,
    pair_labels, token_pair_weights, scale, formulas, term_numbers, term_flags,
):  # fmt: skip
    head, plan, scored, gradients = _setup(
        hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
        tp_group, vocab_start, vocab_rows, backend, token_weights, host_pair_index,
    )  # fmt: skip
    problem = engine.PairProblem(
        scored.weights, ref, pair_weights, pair_margins, pair_labels, token_pair_weights, scale,
        unpack_terms(formulas, term_numbers, term_flags), backend,
    )  # fmt: skip
    problem.prepare(plan, host_step_offsets.numpy(), host_pair_index.numpy(), labels.device)
    num_steps, num_pairs = host_step_offsets.shape[0] - 1, host_pair_index.shape[0]
    results = engine.run_pref(head, scored, plan, problem, gradients, num_steps, num_pairs)
    return *results, *_gradients(head, gradients, grad_dtype)


def _linear_pref_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, token_weights, ref, host_pair_index, pair_weights, pair_margins,
    pair_labels, token_pair_weights, scale, formulas, term_numbers, term_flags,
):  # fmt: skip
    acc = accumulator(dtype)
    sizes = ((), host_step_offsets.shape[0] - 1, (len(term_flags), host_pair_index.shape[0]), rows.shape[0])
    results = (weight.new_empty(size, dtype=acc) for size in sizes)
    return *results, *_fake_gradients(hidden, weight, needs, dtype, grad_dtype)


def _linear_logps_fwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend,
):  # fmt: skip
    head, plan, scored, gradients = _setup(
        hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
        tp_group, vocab_start, vocab_rows, backend, None, None,
    )  # fmt: skip
    tokens, lse = engine.run_logps(head, scored, plan, gradients)
    return tokens, lse, _gradients(head, gradients, grad_dtype)[0]


def _linear_logps_fwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, *args
):
    tokens = weight.new_empty(rows.shape, dtype=accumulator(dtype))
    directions = _fake_gradients(hidden, weight, needs, dtype, grad_dtype)[0]
    return tokens, torch.empty_like(tokens, dtype=torch.float64), directions


def _linear_logps_bwd(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
    tp_group, vocab_start, vocab_rows, backend, lse, coef,
):  # fmt: skip
    head, plan, scored, gradients = _setup(
        hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, chunk_bytes,
        tp_group, vocab_start, vocab_rows, backend, None, None,
    )  # fmt: skip
    engine.run_backward(head, scored, plan, lse, coef, gradients)
    return _gradients(head, gradients, grad_dtype)


def _linear_logps_bwd_fake(
    hidden, weight, bias, rows, labels, host_step_offsets, needs, a, c, dtype, accum_dtype, grad_dtype, *args
):
    return _fake_gradients(hidden, weight, needs, dtype, grad_dtype)


linear_pref_fwd = register(
    "linear_pref_fwd",
    f"({_HEAD}, Tensor? token_weights, Tensor? ref, Tensor host_pair_index, Tensor? pair_weights, "
    "Tensor? pair_margins, Tensor? pair_labels, Tensor? token_pair_weights, Tensor scale, str formulas, "
    "float[] term_numbers, int[] term_flags) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
