# SPDX-License-Identifier: Apache-2.0
"""The checked arguments of every call of the linear route: hidden states, LM head, layout and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ..._checks import check_bool, check_count, check_device, check_float, check_shape, describe
from ...backends.addresses import accumulator
from ...layout.kept import KeptTokens
from ...layout.steps import StepLayout
from ..kept import check_kept
from ..shared import logit_map, scale_kept
from .shards import local_part, shard_of


@dataclass(frozen=True, eq=False)
class LinearOptions:
    """The options that every public function of the route takes, as `linear_step_pref_loss` documents them."""

    temperature: float
    logit_softcap: float | None
    logit_scale: float
    chunk_bytes: int | None
    accum_dtype: torch.dtype | None
    weight_grad: Tensor | None
    tp_group: Any
    batch_invariant: bool
    backend: str


@dataclass(frozen=True, eq=False)
class LinearSettings:
    """How the head is applied and where its gradients go; the same for every function of the route."""

    a: float
    c: float
    dtype: torch.dtype  # of the GEMMs
    accum_dtype: torch.dtype
    chunk_bytes: int  # 0: the device's default
    batch_invariant: bool
    tp_group: str  # "": the whole vocabulary is here
    vocab_start: int
    vocab_rows: int  # of the largest shard
    vocab_size: int  # of all shards
    requested: str  # the backend that was asked for
    backend: str  # the one that runs
    weight_grad: Tensor | None
    record: bool  # whether autograd was on at the call; inside an autograd.Function it is always off

    def needs(self, ctx) -> list[bool]:
        """Which of hidden, weight and bias need a gradient, from an autograd.Function's context."""
        return [need and self.record for need in ctx.needs_input_grad[:3]]

    def waits_for_loss_scale(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether gradients are made in backward.

        A head's gradient is a sum over the batch, which fits float16 only under the caller's loss scale.
        """
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return self.dtype == torch.float16 and self.record and trained

    def op_args(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, offsets: Tensor,
        needs: list[bool], extra: Tensor | None, kept: KeptTokens | None,
    ) -> tuple:  # fmt: skip
        """The first arguments of every op of the route: the fields of `ops.HeadCall`."""
        grad_dtype = weight.dtype if self.weight_grad is None else self.weight_grad.dtype
        tables = (None,) * 3 if kept is None else (kept.token_ids, kept.row, kept.host_counts)
        return (
            hidden, weight, bias, rows, labels, extra, *tables, offsets, needs, self.a, self.c, self.dtype,
            self.accum_dtype, grad_dtype, self.chunk_bytes, self.batch_invariant, self.tp_group, self.vocab_start,
            self.vocab_rows, self.vocab_size, self.backend,
        )  # fmt: skip

    def deliver_weight(self, kept: Tensor, upstream: Tensor | None) -> Tensor | None:
        """The weight's gradient times the upstream gradient, or None if it is added to the caller's buffer."""
        scaled = kept if upstream is None else scale_kept(kept, upstream, self.backend)
        if self.weight_grad is None:
            return scaled
        self.weight_grad.add_(scaled)
        return None


@dataclass(frozen=True, eq=False)
class LinearCall:
    """The checked arguments of one call; every function of the route starts from them."""

    hidden: Tensor  # (N0, H)
    weight: Tensor  # (V, H), or this rank's rows of it
    bias: Tensor | None  # (V,)
    layout: StepLayout
    settings: LinearSettings

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of log-probs and losses."""
        return accumulator(self.settings.dtype)

    @property
    def needs(self) -> list[bool]:
        """Which of hidden, weight and bias need a gradient."""
        tensors = (self.hidden, self.weight, self.bias)
        return [self.settings.record and t is not None and t.requires_grad for t in tensors]


def prepare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: StepLayout,
    options: LinearOptions,
) -> LinearCall:
    """Checks the arguments that every function of the linear route takes; DTensors become their local part."""
    chunk_bytes, accum_dtype, weight_grad = options.chunk_bytes, options.accum_dtype, options.weight_grad
    tp_group, backend = options.tp_group, options.backend
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
    features = hidden.shape[-1]
    if not features:
        raise ValueError(f"hidden: expected at least one feature in the last dimension, got {describe(hidden)}")
    if weight.shape[1] != features:
        turned = "; it is transposed, pass weight.t()" if weight.shape[0] == features else ""
        raise ValueError(f"weight: expected shape (V, {features}), as hidden has, got {describe(weight)}{turned}")
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
    if chunk_bytes is not None:
        check_count("chunk_bytes", chunk_bytes)
    check_bool("batch_invariant", options.batch_invariant)
    layout.check_vocab(shard.vocab)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    autocast = hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    accum_dtype = accumulator(dtype) if accum_dtype is None else accum_dtype
    if accum_dtype not in (accumulator(dtype), dtype):
        raise ValueError(f"accum_dtype: expected {accumulator(dtype)} or {dtype}, got {accum_dtype!r}")
    name = backends.select(backend, hidden.device.type, dtype)
    if name == "reference" and (tp_group is not None or weight_grad is not None or options.batch_invariant):
        raise ValueError("backend: 'reference' has no tp_group, weight_grad or batch_invariant; use another backend")
    if name == "cuda" and options.batch_invariant:  # csrc/cuda/launch.h, row_splits
        raise ValueError(
            "backend: 'cuda' has no batch_invariant, since its blocks share a row by the number of rows; use 'triton'"
        )
    check_kept(layout, options.logit_softcap, tp_group)
    a, c = logit_map(options.temperature, options.logit_softcap, options.logit_scale)
    settings = LinearSettings(
        a, c, dtype, accum_dtype, chunk_bytes or 0, options.batch_invariant, shard.group_name, shard.start,
        shard.largest, shard.vocab, backend, name, weight_grad, torch.is_grad_enabled(),
    )  # fmt: skip
    return LinearCall(hidden.reshape(-1, hidden.shape[-1]), weight, bias, layout, settings)
