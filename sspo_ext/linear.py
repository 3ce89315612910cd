"""The linear route: step log-probs and losses from hidden states and the LM head, without ever storing the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, linear_ops
from .autograd import once
from ._checks import check_device, check_float, check_shape
from .backends import reference
from .heads import get_pair_head
from .layout import StepLayout
from .linear_engine import accumulator
from .logps import PairLossSpec, StepLogps, logit_map, step_loss
from .losses import StepPrefOutput, pair_loss_spec, reference_loss, resolve_pairs
from .pairs import StepPairs
from .tensor_parallel import shard_of


class LinearSettings:
    """How the head is applied and its gradients kept; the same for every function of the route."""

    def __init__(self, a, c, dtype, accum_dtype, chunk_bytes, tp_group, vocab_start, backend, weight_grad):
        self.a, self.c, self.dtype, self.accum_dtype = a, c, dtype, accum_dtype
        self.chunk_bytes, self.tp_group, self.vocab_start, self.backend = chunk_bytes, tp_group, vocab_start, backend
        self.weight_grad = weight_grad

    def op_args(self, weight: Tensor) -> tuple:
        grad_dtype = weight.dtype if self.weight_grad is None else self.weight_grad.dtype
        return (
            self.a,
            self.c,
            self.dtype,
            self.accum_dtype,
            grad_dtype,
            self.chunk_bytes,
            self.tp_group,
            self.vocab_start,
            self.backend,
        )


class LinearPrefRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> loss (), sums (S,), pair losses (P,). Gradients are accumulated in forward."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: StepLayout,
        spec: PairLossSpec,
        s: LinearSettings,
    ):
        needs = list(ctx.needs_input_grad[:3])
        acc = accumulator(s.dtype)
        pairs = spec.pairs

        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(acc)

        loss, sums, _, pair_losses, coef, d_rows, d_weight, d_bias = linear_ops.linear_pref_fwd(
            hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, needs, *s.op_args(weight),
            cast(layout.weights), cast(spec.ref), pairs.host_index, cast(pairs.weights), cast(pairs.margins),
            cast(pairs.soft_labels), cast(spec.scale), spec.head, list(spec.options), spec.label,
        )  # fmt: skip
        if any(needs):
            ctx.save_for_backward(hidden, weight, bias, layout.rows, coef, d_rows, d_weight, d_bias)
            ctx.settings = (needs, s)
        ctx.mark_non_differentiable(sums, pair_losses)
        ctx.set_materialize_grads(False)
        return loss, sums, pair_losses

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 6
        hidden, weight, bias, rows, coef, d_rows, d_weight, d_bias = ctx.saved_tensors
        needs, s = ctx.settings
        with torch.no_grad():
            scale = coef * d_loss if coef.numel() else d_loss.expand(rows.shape)
            d_hidden = _scatter_rows(d_rows, scale, rows, hidden) if needs[0] else None
            d_weight = _deliver(d_weight, d_loss, s.weight_grad) if needs[1] else None
            d_bias = (d_bias * d_loss).to(bias.dtype) if needs[2] else None
        return *once((d_hidden, d_weight, d_bias), (hidden, weight, bias)), None, None, None


class LinearLogpsRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> token log-probs (N,), for gradients known only in backward.

    With a frozen head the gradient is a row scalar times a direction kept from forward; else backward computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: StepLayout, s: LinearSettings):
        needs = list(ctx.needs_input_grad[:3])
        frozen = needs == [True, False, False]
        tokens, lse, d_rows = linear_ops.linear_logps_fwd(
            hidden,
            weight,
            bias,
            layout.rows,
            layout.labels,
            layout.host_step_offsets,
            [frozen, False, False],
            *s.op_args(weight),
        )
        if any(needs):
            ctx.save_for_backward(
                hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, lse, d_rows
            )
            ctx.settings = (needs, frozen, s)
        return tokens

    @staticmethod
    def backward(ctx, d_tokens):
        needs, frozen, s = ctx.settings
        hidden, weight, bias, rows, labels, offsets, lse, d_rows = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        with torch.no_grad():
            one = d_tokens.new_ones(())
            if not frozen:
                d_rows, d_weight, d_bias = linear_ops.linear_logps_bwd(
                    hidden, weight, bias, rows, labels, offsets, needs, *s.op_args(weight), lse, d_tokens.contiguous()
                )
            if needs[0]:
                d_hidden = _scatter_rows(d_rows, d_tokens if frozen else one.expand(rows.shape), rows, hidden)
            d_weight = _deliver(d_weight, one, s.weight_grad) if needs[1] else None
            d_bias = d_bias.to(bias.dtype) if needs[2] else None
        return *once((d_hidden, d_weight, d_bias), (hidden, weight, bias)), None, None


def _scatter_rows(d_rows: Tensor, scale: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    """(N0, H): scale * d_rows at the scored rows, exactly zero elsewhere. The product is taken in float32 and rounded once."""
    return torch.zeros_like(hidden).index_copy_(0, rows, (d_rows * scale[:, None]).to(hidden.dtype))


def _deliver(accumulated: Tensor, upstream: Tensor, buffer: Tensor | None) -> Tensor | None:
    """upstream * accumulated: added to the caller's buffer, or as the gradient autograd gets."""
    if buffer is not None:
        buffer.addcmul_(accumulated, upstream.to(accumulated.dtype))
        return None
    if not torch.compiler.is_compiling() and upstream.device.type == "cpu":
        # a read of host memory, not a sync: spares a pass over (V, H) for the usual upstream gradient of 1
        return accumulated if upstream.item() == 1 else accumulated * upstream.to(accumulated.dtype)
    return accumulated * upstream.to(accumulated.dtype)


def linear_step_logps(
    hidden: Tensor,  # (B, T, H), or (total, H) with a packed layout: the model's last hidden states
    weight: Tensor,  # (V, H), dtype may differ from hidden's; this rank's rows of it under tp_group
    layout: StepLayout,
    *,
    bias: Tensor | None = None,  # (V,)
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

    Only scored rows enter a GEMM. One GEMM (N x H x V) without gradients, two with a frozen head, four with a trained one, since the
    gradient of each step is known only in backward; `linear_step_pref_loss` does it in three. Arguments and errors as there.

    Example::

        >>> with torch.no_grad():
        ...     ref = linear_step_logps(ref_hidden, ref_head.weight, layout).sums
    """
    hidden, weight, settings = _prepare(
        hidden,
        weight,
        bias,
        layout,
        temperature,
        logit_softcap,
        logit_scale,
        chunk_bytes,
        accum_dtype,
        weight_grad,
        tp_group,
        backend,
    )
    if settings.backend == "reference":
        tokens = reference.token_logps(
            _project(hidden, weight, bias, settings), layout.rows, layout.labels, settings.a, settings.c
        )
    else:
        tokens = LinearLogpsRoute.apply(hidden, weight, bias, layout, settings)
    if settings.backend == "reference":
        sums = reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    else:
        sums = StepSums.apply(tokens, layout, settings.backend)
    return StepLogps(sums, layout.counts, tokens)


class StepSums(torch.autograd.Function):
    """(N,) token log-probs -> (S,) step sums by the backend's ordered reduction."""

    @staticmethod
    def forward(ctx, tokens: Tensor, layout: StepLayout, backend: str):
        ctx.layout = layout
        weights = None if layout.weights is None else layout.weights.to(tokens.dtype)
        return step_loss(tokens, weights, layout, None, backend)[1]

    @staticmethod
    def backward(ctx, d_sums):
        per_row = d_sums[ctx.layout.step_of_row]
        weights = ctx.layout.weights
        return per_row if weights is None else per_row * weights.to(per_row.dtype), None, None


def linear_step_pref_loss(
    hidden: Tensor,
    weight: Tensor,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    loss_type: str = "sigmoid",
    beta: float | None = None,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    tp_group=None,
    backend: str = "auto",
    **loss_options: float,
) -> StepPrefOutput:
    """`step_pref_loss(hidden @ weight.T + bias, layout, pairs)`, without ever storing the (N, V) logits.

    Prompt, padding, ignored and zero-weight tokens cost nothing and get exactly zero gradient. Rows are worked on in chunks that fit
    `chunk_bytes`; extra memory is that budget and the gradients asked for, at any sequence length. Gradients are made in forward:
    1 GEMM (N x H x V) without gradients, 2 with a frozen head, 3 with a trained one when each connected set of pairs fits in a chunk,
    4 for a set that does not. `layout.plan(...)` prints it. GEMMs run in the promoted dtype of hidden and weight, or in autocast's;
    a weight of another dtype is then copied once a call.

    Args:
        hidden: (B, T, H), or (total, H) with a packed layout.
        weight: (V, H) head weight. May be a DTensor sharded over its rows, with `tp_group` left to it.
        layout, pairs, ref, loss_type, beta, ... : as in `step_pref_loss`.
        bias: (V,). The distribution is softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature).
        chunk_bytes: budget of the logits buffer; default 128 MiB on CPUs, 512 MiB elsewhere.
        accum_dtype: dtype in which the weight's gradient accumulates over chunks, float32 by default (float64 for float64).
        weight_grad: (V, H) buffer that the weight's gradient is added to in backward (`main_grad`); autograd then sees none.
        tp_group: process group over which the vocabulary is split in equal parts, this rank's rows being `weight` (Megatron's layout).

    Returns:
        StepPrefOutput; `.loss` is float32 (float64 for float64).

    Example::

        >>> hidden = model.model(input_ids).last_hidden_state
        >>> linear_step_pref_loss(hidden, model.lm_head.weight, layout, pairs, ref=ref_sums).loss.backward()
    """
    head = get_pair_head(loss_type)
    if token_weights is not None:
        layout = layout.with_row_weights(token_weights)
    hidden, weight, settings = _prepare(
        hidden,
        weight,
        bias,
        layout,
        temperature,
        logit_softcap,
        logit_scale,
        chunk_bytes,
        accum_dtype,
        weight_grad,
        tp_group,
        backend,
    )
    pairs = resolve_pairs(layout, pairs, weights, margins, soft_labels)
    acc = accumulator(settings.dtype)
    spec = pair_loss_spec(head, layout, pairs, acc, ref, beta, label_smoothing, reduction, num_items, loss_options)
    if settings.backend == "reference":
        loss, sums, pair_losses = reference_loss(
            _project(hidden, weight, bias, settings), layout, spec, settings.a, settings.c
        )
    else:
        loss, sums, pair_losses = LinearPrefRoute.apply(hidden, weight, bias, layout, spec, settings)
    return StepPrefOutput(
        loss, sums.detach(), pair_losses.detach(), layout, pairs, spec.ref, spec.options[0], head.per_token_reward
    )


def _prepare(
    hidden,
    weight,
    bias,
    layout,
    temperature,
    logit_softcap,
    logit_scale,
    chunk_bytes,
    accum_dtype,
    weight_grad,
    tp_group,
    backend,
) -> tuple[Tensor, Tensor, LinearSettings]:
    """Checks; returns (N0, H) hidden states, the local (V, H) weight and the call's settings."""
    if not isinstance(layout, StepLayout):
        raise TypeError(f"layout: expected a StepLayout, got {type(layout).__name__}")
    check_float("hidden", hidden, ndim=(2, 3))
    weight, group_name, vocab_start, vocab = shard_of(weight, tp_group)
    check_float("weight", weight, ndim=2)
    check_shape("weight", weight, (weight.shape[0], hidden.shape[-1]))
    batch, length = layout.shape
    flat = hidden.ndim == 2 and batch == 1
    check_shape("hidden", hidden, (length, hidden.shape[-1]) if flat else (batch, length, hidden.shape[-1]))
    check_device("weight", weight, hidden.device, "hidden")
    if hidden.device != layout.device:
        raise ValueError(
            f"layout: expected it on {hidden.device}, where hidden is (layout.to(...)), got {layout.device}"
        )
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
        check_device("bias", bias, hidden.device, "hidden")
    if weight_grad is not None:
        check_float("weight_grad", weight_grad)
        check_shape("weight_grad", weight_grad, tuple(weight.shape))
    if chunk_bytes is not None and not (isinstance(chunk_bytes, int) and chunk_bytes > 0):
        raise ValueError(f"chunk_bytes: expected a number of bytes above 0, got {chunk_bytes!r}")
    layout.check_vocab(vocab)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    name = backends.select(backend, hidden.device.type, dtype)
    if name == "reference" and (group_name or weight_grad is not None):
        raise ValueError("backend: 'reference' has neither tp_group nor weight_grad; use another backend")
    a, c = logit_map(temperature, logit_softcap, logit_scale)
    settings = LinearSettings(
        a, c, dtype, accumulator(dtype) if accum_dtype is None else accum_dtype, chunk_bytes or 0, group_name, vocab_start, name,
        weight_grad,
    )  # fmt: skip
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden, weight, settings


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: LinearSettings) -> Tensor:
    dtype = settings.dtype
    return torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))[
        None
    ]
