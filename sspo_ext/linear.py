"""The linear route: step log-probs and losses from hidden states and the LM head, without ever storing the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, linear_ops
from ._checks import check_device, check_float, check_shape
from .autograd import refuse_double_backward, scale_kept
from .backends import reference
from .layout import StepLayout
from .linear_engine import accumulator
from .linear_reductions import kl_reference, linear_reductions, reference_logits
from .logps import StepLogps, StepSums, logit_map, step_loss
from .losses import StepPrefOutput, pref_output
from .pair_spec import chosen_heads, pair_loss_spec, reference_loss, resolve_pairs
from .pairs import StepPairs
from .tensor_parallel import local_part, shard_of
from .terms import PairLossSpec, pack_terms


@dataclass(frozen=True, eq=False)
class LinearSettings:
    """How the head is applied and its gradients kept; the same for every function of the route."""

    a: float
    c: float
    dtype: torch.dtype  # of the GEMMs
    accum_dtype: torch.dtype
    chunk_bytes: int  # 0: the device's default
    tp_group: str  # "": the whole vocabulary is here
    vocab_start: int
    vocab_rows: int  # of the largest shard
    backend: str
    weight_grad: Tensor | None
    record: bool  # whether autograd was on; inside an autograd.Function it never is

    def needs(self, ctx) -> list[bool]:
        return [need and self.record for need in ctx.needs_input_grad[:3]]

    def waits_for_loss_scale(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether gradients are made in backward: float16 is too narrow for a head's gradient, a sum over the batch,
        before the caller's loss scale has brought it into range."""
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return self.dtype == torch.float16 and self.record and trained

    def op_args(self, weight: Tensor) -> tuple:
        grad_dtype = weight.dtype if self.weight_grad is None else self.weight_grad.dtype
        return (
            self.a, self.c, self.dtype, self.accum_dtype, grad_dtype, self.chunk_bytes, self.tp_group, self.vocab_start,
            self.vocab_rows, self.backend,
        )  # fmt: skip

    def deliver_weight(self, kept: Tensor, upstream: Tensor) -> Tensor | None:
        """The weight's gradient, or None when it goes into the caller's buffer."""
        if self.weight_grad is None:
            return scale_kept(kept, upstream)
        self.weight_grad.add_(scale_kept(kept, upstream))
        return None


class LinearPrefRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> loss (), sums (S,), term losses (C, P), with gradients from
    forward."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: StepLayout,
        spec: PairLossSpec,
        settings: LinearSettings,
    ):
        needs, acc, pairs = settings.needs(ctx), accumulator(settings.dtype), spec.pairs

        def cast(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(acc).contiguous()

        loss, sums, pair_losses, coef, d_hidden, d_weight, d_bias = linear_ops.linear_pref_fwd(
            hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, needs,
            *settings.op_args(weight), cast(layout.weights), cast(spec.ref), pairs.host_index, cast(pairs.weights),
            cast(pairs.margins), cast(pairs.soft_labels), cast(spec.token_pair_weights),
            spec.scale.to(acc), *pack_terms(spec.terms),
        )  # fmt: skip
        if any(needs):
            ctx.save_for_backward(layout.rows, coef, d_hidden, d_weight, d_bias)
            ctx.needs, ctx.settings = needs, settings
            ctx.dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums, pair_losses)
        ctx.set_materialize_grads(False)
        return loss, sums, pair_losses

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 6
        refuse_double_backward()
        rows, coef, d_hidden, d_weight, d_bias = ctx.saved_tensors
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        if linear_ops.is_frozen(needs):
            d_hidden = _scale_rows(d_hidden, rows, coef * d_loss).to(dtype)
        elif needs[0]:
            d_hidden = scale_kept(d_hidden, d_loss)
        return (
            d_hidden if needs[0] else None,
            settings.deliver_weight(d_weight, d_loss) if needs[1] else None,
            (d_bias * d_loss).to(bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )


class LinearLogpsRoute(torch.autograd.Function):
    """(N0, H) hidden, (V, H) weight, (V,) bias -> token log-probs (N,), for gradients known only in backward.

    With a frozen head the gradient is a row scalar times a direction kept from forward; else backward computes the
    logits again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: StepLayout, settings: LinearSettings):
        needs = settings.needs(ctx)
        in_forward = [linear_ops.is_frozen(needs), False, False]
        tokens, lse, directions = linear_ops.linear_logps_fwd(
            hidden, weight, bias, layout.rows, layout.labels, layout.host_step_offsets, in_forward,
            *settings.op_args(weight),
        )  # fmt: skip
        if in_forward[0]:
            ctx.save_for_backward(layout.rows, directions)
        elif any(needs):
            ctx.save_for_backward(layout.rows, hidden, weight, bias, layout.labels, layout.host_step_offsets, lse)
        ctx.needs, ctx.settings = needs, settings
        ctx.dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        return tokens

    @staticmethod
    def backward(ctx, d_tokens):
        refuse_double_backward()
        needs, settings, (dtype, bias_dtype) = ctx.needs, ctx.settings, ctx.dtypes
        if linear_ops.is_frozen(needs):
            rows, directions = ctx.saved_tensors
            return _scale_rows(directions, rows, d_tokens).to(dtype), None, None, None, None
        rows, hidden, weight, bias, labels, offsets, lse = ctx.saved_tensors
        d_hidden, d_weight, d_bias = linear_ops.linear_logps_bwd(
            hidden, weight, bias, rows, labels, offsets, needs, *settings.op_args(weight), lse, d_tokens.contiguous()
        )
        return (
            d_hidden if needs[0] else None,
            settings.deliver_weight(d_weight, d_tokens.new_ones(())) if needs[1] else None,
            d_bias.to(bias_dtype) if needs[2] else None,
            None,
            None,
        )


class TokensLoss(torch.autograd.Function):
    """(N,) token log-probs -> loss (), step sums (S,), pair losses of each term (C, P), by launch 2."""

    @staticmethod
    def forward(ctx, tokens: Tensor, layout: StepLayout, spec: PairLossSpec, backend: str):
        weights = None if layout.weights is None else layout.weights.to(tokens.dtype).contiguous()
        loss, sums, pair_losses, coef = step_loss(tokens, weights, layout, spec, backend)
        ctx.save_for_backward(coef)
        ctx.mark_non_differentiable(sums, pair_losses)
        return loss, sums, pair_losses

    @staticmethod
    def backward(ctx, d_loss, *_):
        (coef,) = ctx.saved_tensors
        return coef * d_loss, None, None, None


def _scale_rows(directions: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """(N0, H): directions[rows] times scale (N,); rows that are not scored are zeros already."""
    everywhere = scale.new_zeros(directions.shape[0]).index_copy_(0, rows, scale)
    return scale_kept(directions, everywhere[:, None])


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


def linear_step_pref_loss(
    hidden: Tensor,
    weight: Tensor,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
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

    Prompt, padding, ignored and zero-weight tokens cost nothing and get exactly zero gradient. Rows are worked on in
    chunks that fit `chunk_bytes`; extra memory is that budget and the gradients asked for, at any sequence length.
    Gradients are made in forward: 1 GEMM (N x H x V) without gradients, 2 with a frozen head, 3 with a trained one when
    each connected set of pairs fits in a chunk, 4 for a set that does not. In float16 a trained head costs 4 and its
    gradients are made in backward, under the caller's loss scale. `layout.plan(...)` prints it. GEMMs run in the
    promoted dtype of hidden and weight, or in autocast's; a weight of another dtype is then copied once a call. The
    same budget gives the same bits.

    Args:
        hidden: (B, T, H), or (total, H) with a packed layout. Copied once if its positions are not evenly strided.
        weight: (V, H) head weight.
        layout, pairs, ref, loss_type, loss_weights, beta, ...: as in `step_pref_loss`; a StepLayout is needed here.
        bias: (V,). The distribution is softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature).
        chunk_bytes: budget of the logits buffer; default 128 MiB on CPUs, 512 MiB elsewhere.
        accum_dtype: dtype in which the weight's gradient accumulates over chunks, float32 by default (float64 for
            float64); the weight's own is allowed.
        weight_grad: (V, H) buffer that the weight's gradient is added to in backward (`main_grad`); autograd then sees
            none.
        tp_group: process group over which the vocabulary is split in equal parts, this rank's rows being `weight`
            (Megatron's layout; rows that pad V must carry a bias of -inf), or, beside a DTensor weight sharded over
            its rows, the group of its mesh. Labels and hidden states must be equal on all its ranks.

    Returns:
        StepPrefOutput; `.loss` is float32 (float64 for float64). Differentiable once: create_graph=True raises.

    Example::

        >>> hidden = model.model(input_ids).last_hidden_state
        >>> linear_step_pref_loss(hidden, model.lm_head.weight, layout, pairs, ref=ref_sums).loss.backward()
    """
    heads = chosen_heads(loss_type, loss_weights)
    if token_weights is not None and isinstance(layout, StepLayout):
        layout = layout.with_row_weights(token_weights)
    hidden, weight, bias, settings = _prepare(
        hidden, weight, bias, layout, temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad,
        tp_group, backend,
    )  # fmt: skip
    pairs = resolve_pairs(layout, pairs, weights, margins, soft_labels)
    acc = accumulator(settings.dtype)
    spec = pair_loss_spec(heads, layout, pairs, acc, ref, beta, label_smoothing, reduction, num_items, loss_options)
    if settings.backend == "reference":
        tokens = _reference_tokens(hidden, weight, bias, layout, settings)
        loss, sums, losses = reference_loss(tokens, layout, spec)
    elif settings.waits_for_loss_scale(weight, bias):
        tokens = LinearLogpsRoute.apply(hidden, weight, bias, layout, settings)
        loss, sums, losses = TokensLoss.apply(tokens, layout, spec, settings.backend)
    else:
        loss, sums, losses = LinearPrefRoute.apply(hidden, weight, bias, layout, spec, settings)
    return pref_output(loss, sums, losses, layout, spec)


def _prepare(
    hidden, weight, bias, layout, temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad,
    tp_group, backend,
) -> tuple[Tensor, Tensor, Tensor | None, LinearSettings]:  # fmt: skip
    """Checks; returns (N0, H) hidden states, the local (V, H) weight and (V,) bias, and the call's settings."""
    if not isinstance(layout, StepLayout):
        raise TypeError(
            f"layout: expected a StepLayout, got {type(layout).__name__}; StepLayout.from_step_ids(labels, step_ids) "
            "builds one from plain tensors"
        )
    check_float("hidden", hidden, ndim=(2, 3))
    if hasattr(hidden, "device_mesh"):
        raise TypeError("hidden: expected a plain tensor, got a DTensor; pass hidden.full_tensor() or its local part")
    check_float("weight", weight, ndim=2)
    shard = shard_of(weight, tp_group)
    weight = local_part(weight)
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
        bias = local_part(bias)
        check_float("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
        check_device("bias", bias, hidden.device, "hidden")
    if weight_grad is not None:
        weight_grad = local_part(weight_grad)
        check_float("weight_grad", weight_grad)
        check_shape("weight_grad", weight_grad, tuple(weight.shape))
        check_device("weight_grad", weight_grad, weight.device, "the weight")
        if torch.is_grad_enabled() and not weight.requires_grad:
            raise ValueError("weight_grad: expected None for a weight that does not require grad, got a buffer")
    if chunk_bytes is not None and not (isinstance(chunk_bytes, int) and chunk_bytes > 0):
        raise ValueError(f"chunk_bytes: expected a number of bytes above 0, got {chunk_bytes!r}")
    layout.check_vocab(shard.vocab)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    accum_dtype = accumulator(dtype) if accum_dtype is None else accum_dtype
    if accum_dtype not in (accumulator(dtype), dtype):
        raise ValueError(f"accum_dtype: expected {accumulator(dtype)} or {dtype}, got {accum_dtype!r}")
    name = backends.select(backend, hidden.device.type, dtype)
    if name == "reference" and (tp_group is not None or weight_grad is not None):
        raise ValueError("backend: 'reference' has neither tp_group nor weight_grad; use another backend")
    a, c = logit_map(temperature, logit_softcap, logit_scale)
    settings = LinearSettings(
        a, c, dtype, accum_dtype, chunk_bytes or 0, shard.group_name, shard.start, shard.largest, name, weight_grad,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias, settings


def _reference_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: StepLayout, settings: LinearSettings
) -> Tensor:
    rows = torch.arange(layout.num_rows, device=hidden.device)
    logits = reference_logits(hidden, weight, bias, layout, settings)
    return reference.token_logps(logits, rows, layout.labels, settings.a, settings.c)
