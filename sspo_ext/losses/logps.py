"""Step log-probs from logits, or from hidden states and the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.steps import StepLayout
from ..objective.sums import StepLogps
from ..routes.linear import settings as linear
from ..routes.linear.logps import logps as linear_logps
from ..routes.linear.reductions import kl_reference
from ..routes.linear.reductions import logps_with_reductions as linear_logps_with_reductions
from ..routes.logits.prepare import layout_of, prepare
from ..routes.logits.reductions import logps_with_reductions
from ..routes.logits.route import logps


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
    call = linear.prepare(
        hidden, weight, bias, layout, temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad,
        tp_group, backend,
    )  # fmt: skip
    ref = kl_reference(call, kl_ref_hidden, kl_ref_weight, kl_ref_bias)
    if entropy or sum_p2 or kl_ref_hidden is not None:
        return linear_logps_with_reductions(call, ref, entropy=entropy, sum_p2=sum_p2)
    tokens, sums = linear_logps(call)
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
    call = prepare(logits, layout, temperature, logit_softcap, logit_scale, backend, inplace_backward)
    if entropy or sum_p2 or kl_ref_logits is not None:
        return logps_with_reductions(call, kl_ref_logits, entropy=entropy, sum_p2=sum_p2)
    tokens, sums = logps(call)
    return StepLogps(sums, layout.counts, tokens)
