# SPDX-License-Identifier: Apache-2.0
"""Step log-probs from logits, or from hidden states and the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_bool
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
    hidden: Tensor,
    weight: Tensor,
    layout: StepLayout,
    *,
    bias: Tensor | None = None,
    entropy: bool = False,
    sum_p2: bool = False,
    kl_ref_hidden: Tensor | None = None,
    kl_ref_weight: Tensor | None = None,
    kl_ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    tp_group=None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> StepLogps:
    """Sum over each step of log_softmax(hidden @ weight.T + bias)[row, label], without storing (N, V); differentiable.

    Only scored rows enter a GEMM. It costs one GEMM (N x H x V) without gradients, two with a frozen head, and four
    with a trained one, since the gradient of each step is known only in backward; `linear_step_pref_loss` needs three.

    Entropy, sum_p2 and kl come from the same chunks. Without gradients they cost no further GEMM. With gradients
    backward computes the logits again: three GEMMs with a frozen head, four with a trained one. The reference's logits
    cost one GEMM (N x H' x V) forward and, for a gradient at `.kl`, one backward; their buffer shares `chunk_bytes`.

    Args:
        hidden: (B, T, H), or (total, H) with a packed layout: the model's last hidden states.
        weight: (V, H), the LM head's; its dtype may differ from that of `hidden`.
        layout: StepLayout.
        bias: (V,), the LM head's.
        entropy: as in `step_logps`.
        sum_p2: as in `step_logps`.
        kl_ref_hidden: (B, T, H') or (total, H'), the reference's last hidden states; they give `.kl`.
        kl_ref_weight: (V, H'), the reference's LM head; default: `weight` and `bias`. This rank's rows with `tp_group`.
        kl_ref_bias: (V,), the reference's.
        temperature: as in `step_pref_loss`; the logits are hidden @ weight.T + bias.
        logit_softcap: as in `step_pref_loss`.
        logit_scale: as in `step_pref_loss`.
        chunk_bytes: as in `linear_step_pref_loss`.
        accum_dtype: as in `linear_step_pref_loss`.
        weight_grad: as in `linear_step_pref_loss`.
        tp_group: as in `linear_step_pref_loss`.
        batch_invariant: as in `linear_step_pref_loss`.
        backend: as in `step_pref_loss`.

    Returns:
        StepLogps.

    Raises:
        TypeError: An argument has a wrong type. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> with torch.no_grad():
        ...     hidden = model.model(input_ids).last_hidden_state
        ...     ref = linear_step_logps(hidden, model.lm_head.weight, layout)
    """
    options = linear.LinearOptions(
        temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad, tp_group, batch_invariant,
        backend,
    )  # fmt: skip
    call = linear.prepare(hidden, weight, bias, layout, options)
    check_bool("entropy", entropy)
    check_bool("sum_p2", sum_p2)
    ref = kl_reference(call, kl_ref_hidden, kl_ref_weight, kl_ref_bias)
    if entropy or sum_p2 or kl_ref_hidden is not None:
        return linear_logps_with_reductions(call, ref, entropy=entropy, sum_p2=sum_p2)
    tokens, sums = linear_logps(call)
    return StepLogps(sums, layout.counts, tokens)


def step_logps(
    logits: Tensor,
    layout: StepLayout | Tensor | None = None,
    step_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    entropy: bool = False,
    sum_p2: bool = False,
    kl_ref_logits: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    inplace_backward: bool = False,
) -> StepLogps:
    """log_softmax(logits)[row, label] of every scored token, and its weighted sum over each step; differentiable.

    Reads each scored row once and stores no softmax. Log-probs accumulate in float32 (float64 for float64 logits).
    Differentiable once: a second derivative raises. Also takes plain tensors, `step_logps(logits, labels, step_ids)`.

    The same read gives, of each scored row's distribution pi (after scale, softcap and temperature), what is asked for.
    All are differentiable, and one pass backward writes the gradient of everything. The reference is a constant. A
    logit of -inf has probability 0 and adds nothing; kl is infinite where the reference has a probability and pi none.

    Args:
        logits: (B, T, V), or (total, V) with a packed layout. Copied once if its last dimension is not contiguous.
        layout: StepLayout, or unshifted labels (B, T) int.
        step_ids: (B, T) int, beside plain labels.
        labels: the labels, by name instead of as `layout`.
        entropy: whether to give `.entropy` (N,), in nats.
        sum_p2: whether to give `.sum_p2` (N,), sum_v pi_v^2. It is at least 1 / V, so its logarithm is accurate.
        kl_ref_logits: a reference's logits, of the shape and dtype of `logits`; they give `.kl` (N,),
            KL(reference || pi).
        temperature: as in `step_pref_loss`.
        logit_softcap: as in `step_pref_loss`.
        logit_scale: as in `step_pref_loss`.
        backend: as in `step_pref_loss`.
        inplace_backward: write the gradient over the logits. Nothing else may need their values in backward; autograd
            raises if something does.

    Returns:
        StepLogps: `.sums` (S,), `.tokens` (N,), and what else was asked for.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument.
        ValueError: A shape or device does not fit the layout.

    Examples:
        >>> with torch.no_grad():
        ...     ref = step_logps(model(input_ids).logits, layout)
    """
    layout = layout_of(logits, layout, labels, step_ids)
    call = prepare(logits, layout, temperature, logit_softcap, logit_scale, backend, inplace_backward)
    check_bool("entropy", entropy)
    check_bool("sum_p2", sum_p2)
    if entropy or sum_p2 or kl_ref_logits is not None:
        return logps_with_reductions(call, kl_ref_logits, entropy=entropy, sum_p2=sum_p2)
    tokens, sums = logps(call)
    return StepLogps(sums, layout.counts, tokens)
