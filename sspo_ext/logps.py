"""Step log-probabilities from logits, and the autograd.Function that every loss on the logits route goes through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, ops
from ._checks import check_device, check_float, check_positive, check_shape, check_tensor
from .autograd import refuse_double_backward
from .backends import reference
from .layout import StepLayout
from .reductions import ReductionsRoute
from .terms import PairLossSpec, evaluate_terms


@dataclass(frozen=True, eq=False)
class StepLogps:
    """Log-probabilities of a batch's steps and of their tokens. 16-bit ones, of a cache, are widened to float32."""

    sums: Tensor  # (S,) float32 (float64 for float64 logits): sum of w * log pi over the step, 0 for an empty one
    counts: Tensor  # (S,) int32: scored tokens
    tokens: Tensor  # (N,) float32 (float64): log pi of each scored token, in row order
    entropy: Tensor | None = None  # (N,) like tokens: -sum_v pi_v log pi_v of each row, in nats
    sum_p2: Tensor | None = None  # (N,): sum_v pi_v^2, in [1 / V, 1]
    kl: Tensor | None = None  # (N,): KL(reference || pi), in nats

    def __post_init__(self):
        # sums, counts and means of them are not to be made in 16 bits by any loss
        for name in ("sums", "tokens", "entropy", "sum_p2", "kl"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                object.__setattr__(self, name, value.float())

    @property
    def means(self) -> Tensor:
        """(S,): sums / counts, 0 for an empty step."""
        return self.sums / self.counts.clamp(min=1)


def logit_map(temperature: float, logit_softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """(a, c) such that z = a * x, or c * tanh(a * x) with a softcap, is the logit of the sampled distribution.

    The order is the models': scale, then softcap, then temperature.
    """
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    if logit_softcap is None:
        return logit_scale / temperature, 0.0
    check_positive("logit_softcap", logit_softcap)
    return logit_scale / logit_softcap, logit_softcap / temperature


class LogitsRoute(torch.autograd.Function):
    """(B, T, V) logits -> loss (), step sums (S,), token log-probs (N,), pair losses of each term (C, P).

    Forward is launches 1 and 2: the log-probs with their log-sum-exp, then sums, loss and d loss/d logp. Backward is
    launch 3. Only the log-sum-exp and d loss/d logp, one float each a row, are kept beside the logits.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        layout: StepLayout,
        spec: PairLossSpec | None,
        a: float,
        c: float,
        backend: str,
        inplace_backward: bool,
    ):
        tokens, lse = ops.token_logp_fwd(logits, layout.rows, layout.labels, a, c, backend)
        weights = None if layout.weights is None else layout.weights.to(tokens.dtype).contiguous()
        loss, sums, pair_losses, coef = step_loss(tokens, weights, layout, spec, backend)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, lse, coef, weights, layout.labels, layout.row_of, layout.step_of_row)
            ctx.settings = (a, c, backend, inplace_backward)
        ctx.mark_non_differentiable(pair_losses)
        ctx.set_materialize_grads(False)
        return loss, sums, tokens, pair_losses

    @staticmethod
    def backward(ctx, d_loss, d_sums, d_tokens, _):
        if d_loss is None and d_sums is None and d_tokens is None:
            return (None,) * 7
        refuse_double_backward()
        logits, lse, coef, weights, labels, row_of, step_of_row = ctx.saved_tensors
        a, c, backend, inplace_backward = ctx.settings
        if d_sums is not None or d_tokens is not None:
            coef = _total_coef(coef, weights, step_of_row, d_loss, d_sums, d_tokens)
            d_loss = None
        args = (logits, row_of, labels, lse, coef, d_loss, a, c, backend)
        if inplace_backward:
            ops.token_logp_bwd_(*args)
            d_logits = logits.detach()  # the saved logits themselves would bring the model's graph along
        else:
            d_logits = ops.token_logp_bwd(*args)
        return d_logits, None, None, None, None, None, None


def step_loss(tokens: Tensor, weights: Tensor | None, layout: StepLayout, spec: PairLossSpec | None, backend: str):
    """Launch 2: (loss, sums, pair losses, d loss/d logp); without a spec only the sums mean anything."""
    offsets = layout.step_offsets
    if spec is None:
        no_pairs, no_adj = offsets.new_empty((0, 2)), offsets.new_empty(0)
        return ops.step_loss_fwd(
            tokens, weights, offsets, None, no_pairs, torch.zeros_like(offsets), no_adj, None, None, None,
            tokens.new_zeros(()), "sigmoid", [1.0], 1.0, backend,
        )  # fmt: skip
    pairs = spec.pairs

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(tokens.dtype).contiguous()

    def launch(*args):
        return ops.step_loss_fwd(*args, backend)

    return evaluate_terms(
        launch, spec.terms, tokens, weights, offsets, cast(spec.ref), pairs.index, pairs.adj_offsets, pairs.adj_pairs,
        cast(pairs.weights), cast(spec.token_pair_weights), cast(pairs.margins), cast(pairs.soft_labels),
        cast(spec.scale),
    )  # fmt: skip


class StepSums(torch.autograd.Function):
    """(N,) token log-probs -> (S,) step sums by the backend's ordered reduction."""

    @staticmethod
    def forward(ctx, tokens: Tensor, layout: StepLayout, backend: str):
        ctx.layout = layout
        weights = None if layout.weights is None else layout.weights.to(tokens.dtype).contiguous()
        return step_loss(tokens, weights, layout, None, backend)[1]

    @staticmethod
    def backward(ctx, d_sums):
        per_row = d_sums[ctx.layout.step_of_row]
        weights = ctx.layout.weights
        return per_row if weights is None else per_row * weights.to(per_row.dtype), None, None


def sums_over_steps(values: Tensor, layout: StepLayout) -> Tensor:
    """(S,): sum of w * value over each step's rows (N,), in row order; differentiable."""
    values = values if values.dtype == torch.float64 else values.float()
    name = backends.select("auto", values.device.type, values.dtype)
    if name == "reference":
        return reference.step_sums(values, layout.weights, layout.step_of_row, layout.num_steps)
    return StepSums.apply(values.contiguous(), layout, name)


def _total_coef(coef, weights, step_of_row, d_loss, d_sums, d_tokens) -> Tensor:
    """d/dlogp (N,) when gradient arrives at the sums or the tokens too, and not at the loss alone."""
    total = torch.zeros_like(coef) if d_loss is None else coef * d_loss
    if d_sums is not None:
        per_row = d_sums[step_of_row]
        total = total + (per_row if weights is None else per_row * weights)
    if d_tokens is not None:
        total = total + d_tokens
    return total


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


def layout_of(
    logits: Tensor, layout, labels: Tensor | None, step_ids: Tensor | None, token_weights: Tensor | None = None
) -> StepLayout:
    """The StepLayout that was given, or one built from plain labels and step ids."""
    if isinstance(layout, StepLayout):
        if labels is not None or step_ids is not None:
            raise TypeError("labels, step_ids: given beside a StepLayout, which holds them already")
        return layout if token_weights is None else layout.with_row_weights(token_weights)
    if layout is not None and labels is not None:
        raise TypeError("labels: given twice, by position and by name")
    labels = labels if layout is None else layout
    check_tensor("labels", labels, ndim=2)
    if step_ids is None:
        raise TypeError("step_ids: expected (B, T) step ids beside plain labels, got None; or pass a StepLayout")
    check_tensor("logits", logits, ndim=3)
    built = StepLayout.from_step_ids(labels, step_ids, token_weights=token_weights, vocab_size=logits.shape[-1])
    return built.to(logits.device)


def prepare(
    logits: Tensor, layout: StepLayout, temperature: float, logit_softcap: float | None, logit_scale: float,
    backend: str, inplace_backward: bool,
) -> tuple[Tensor, tuple[float, float], str]:  # fmt: skip
    """Checks what every function of the logits route takes; returns (B, T, V) logits, the logit map and the backend's
    name."""
    check_float("logits", logits)
    if logits.device != layout.device:
        raise ValueError(
            f"layout: expected it on {logits.device}, where logits is (layout.to(...)), got {layout.device}"
        )
    mapped = logit_map(temperature, logit_softcap, logit_scale)
    name = backends.select(backend, logits.device.type, logits.dtype)
    if inplace_backward and name == "reference":
        raise ValueError(_no_inplace(logits, "no other runs here"))
    if inplace_backward and _may_overlap(logits):
        raise ValueError(
            f"inplace_backward: expected logits whose elements do not share memory, got strides {logits.stride()}"
        )
    return layout.check_logits(logits), mapped, name


def _no_inplace(logits: Tensor, others: str) -> str:
    reasons = backends.reasons(logits.device, logits.dtype)
    return f"inplace_backward: the reference backend cannot write over the logits, and {others} ({reasons})"


def _may_overlap(x: Tensor) -> bool:
    """False where each stride is beyond the reach of all smaller ones, as in every view of a contiguous tensor that
    names no element twice."""
    dims = [(n - 1, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    reach = [sum(m * s for j, (m, s) in enumerate(dims) if j != i and s <= dims[i][1]) for i in range(len(dims))]
    return x.numel() > 0 and any(stride <= far for (_, stride), far in zip(dims, reach, strict=True))
