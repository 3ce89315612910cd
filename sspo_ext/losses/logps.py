"""Step log-probs from logits, or from hidden states and the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._checks import check_device, check_float, check_shape
from ..backends import reference
from ..layout.steps import StepLayout
from ..objective.sums import StepLogps, StepSums
from ..routes.linear.logps import LinearLogpsRoute
from ..routes.linear.reductions import kl_reference, linear_reductions
from ..routes.linear.reference import _reference_tokens
from ..routes.linear.settings import _prepare
from ..routes.logits.prepare import _no_inplace, layout_of, prepare
from ..routes.logits.reductions import ReductionsRoute
from ..routes.logits.route import LogitsRoute


def linear_step_logps(
    hidden: Tensor,  # (B, T, H), or (total, H) with a packed layout: the model's last hidden states
    weight: Tensor,  # (V, H), dtype may differ from hidden's; this rank's rows of it under tp_group
    layout: StepLayout,
    *,
    bias: Tensor | None = None,  # (V,)
    entropy: bool = False,
    sum_p2: bool = False,
    kl_ref_hidden: Tensor | None = None,  # (B, T, H'), or (total, H'): the reference's last hidden states
    kl_ref_weight: Tensor | None = None,  # (V, H'); default: this weight and bias
    kl_ref_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    tp_group=None,
    backend: str = "auto",
) -> StepLogps:
    """Sum over each step of log_softmax(hidden @ weight.T + bias)[row, label], without storing (N, V); differentiable.

    Only scored rows enter a GEMM. One GEMM (N x H x V) without gradients, two with a frozen head, four with a trained
    one, since the gradient of each step is known only in backward; `linear_step_pref_loss` does it in three. Arguments
    and errors as there.

    `entropy`, `sum_p2` and the reference for `.kl` (KL(reference || pi) of each row) are as in `step_logps`, from the
    same chunks. Without gradients they cost no further GEMM; with gradients backward computes the logits again: three
    with a frozen head, four with a trained one. The reference's logits cost one GEMM (N x H' x V) forward and, for a
    gradient at `.kl`, one backward; their buffer shares `chunk_bytes`. With `tp_group`, `kl_ref_weight` and
    `kl_ref_bias` are this rank's rows too.

    Example::

        >>> with torch.no_grad():
        ...     ref = linear_step_logps(ref_hidden, ref_head.weight, layout).sums
    """
    hidden, weight, bias, settings = _prepare(
        hidden, weight, bias, layout, temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad,
        tp_group, backend,
    )  # fmt: skip
    if kl_ref_hidden is None and (kl_ref_weight is not None or kl_ref_bias is not None):
        raise ValueError("kl_ref_hidden: expected the reference's hidden states beside its weight or bias, got None")
    if entropy or sum_p2 or kl_ref_hidden is not None:
        ref = kl_reference(kl_ref_hidden, kl_ref_weight, kl_ref_bias, weight, bias, layout)
        return linear_reductions(hidden, weight, bias, ref, layout, entropy, sum_p2, settings, backend, tp_group)
    if settings.backend == "reference":
        tokens = _reference_tokens(hidden, weight, bias, layout, settings)
        sums = reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    else:
        tokens = LinearLogpsRoute.apply(hidden, weight, bias, layout, settings)
        sums = StepSums.apply(tokens, layout, settings.backend)
    return StepLogps(sums, layout.counts, tokens)


def step_logps(
    logits: Tensor,  # (B, T, V), or (total, V) with a packed layout
    layout: StepLayout | Tensor | None = None,
    step_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    entropy: bool = False,
    sum_p2: bool = False,
    kl_ref_logits: Tensor | None = None,  # like logits
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    inplace_backward: bool = False,
) -> StepLogps:
    """log_softmax(logits)[row, label] of every scored token, and its weighted sum over each step; differentiable.

    Reads each scored row once and stores no softmax. log-probs accumulate in float32 (float64 for float64 logits). With
    `inplace_backward=True` the gradient overwrites the logits: nothing else may need their values in backward (autograd
    raises if something does). Differentiable once: a second backward raises. Logits whose last dimension is not
    contiguous are copied once. Also takes plain (B, T) tensors, `step_logps(logits, labels, step_ids)`.

    In the same read, each asked for alone, of every scored row's distribution pi (after scale, softcap, temperature):
    `entropy=True` gives `.entropy` (N,); `sum_p2=True` gives `.sum_p2` (N,), the plain sum of squares, which is at
    least 1 / V and so loses no digits to its logarithm; `kl_ref_logits`, a reference's logits of the same shape and
    dtype, gives `.kl` (N,), KL(reference || pi). All differentiable, the reference being a constant; gradients at
    sums, tokens and these are written in one pass. An entry of -inf has probability 0 and counts nothing; where the
    reference allows what pi forbids, kl is infinite.

    Raises ValueError or TypeError naming the argument when shapes, dtypes or devices do not fit the layout.

    Example::

        >>> with torch.no_grad():
        ...     ref = step_logps(reference_model(ids).logits, layout).sums
    """
    layout = layout_of(logits, layout, labels, step_ids)
    logits, (a, c), name = prepare(logits, layout, temperature, logit_softcap, logit_scale, backend, inplace_backward)
    if entropy or sum_p2 or kl_ref_logits is not None:
        return _with_reductions(logits, layout, entropy, sum_p2, kl_ref_logits, a, c, backend, name, inplace_backward)
    if name == "reference":
        tokens = reference.token_logps(logits, layout.rows, layout.labels, a, c)
        return StepLogps(
            reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps), layout.counts, tokens
        )
    _, sums, tokens, _ = LogitsRoute.apply(logits, layout, None, a, c, name, inplace_backward)
    return StepLogps(sums, layout.counts, tokens)


def _with_reductions(
    logits, layout, entropy: bool, sum_p2: bool, ref: Tensor | None, a, c, requested: str, name: str, inplace_backward
) -> StepLogps:
    if ref is not None:
        check_float("kl_ref_logits", ref, ndim=(2, 3))
        check_device("kl_ref_logits", ref, logits.device, "logits")
        check_shape("kl_ref_logits", ref, tuple(logits.shape[3 - ref.ndim :]))
        ref = layout.check_logits(ref.detach(), "kl_ref_logits")
        if ref.dtype != logits.dtype:
            raise TypeError(f"kl_ref_logits: expected {logits.dtype}, as the logits are, got {ref.dtype}")
    name = backends.with_reductions(requested, name)
    if inplace_backward and name == "reference":
        raise ValueError(_no_inplace(logits, "no other has entropy, sum_p2 and kl here"))
    if name == "reference":
        tokens = reference.token_logps(logits, layout.rows, layout.labels, a, c)
        sums = reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
        values = reference.row_reductions(logits, layout.rows, ref, a, c)
    else:
        tokens, *values = ReductionsRoute.apply(logits, ref, layout, a, c, (entropy, sum_p2), name, inplace_backward)
        sums = StepSums.apply(tokens, layout, name)
    return StepLogps(
        sums, layout.counts, tokens, values[0] if entropy else None, values[1] if sum_p2 else None,
        None if ref is None else values[2],
    )  # fmt: skip
