# SPDX-License-Identifier: Apache-2.0
"""The gradients of hidden states, weight and bias, added up over the chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shared import scale_kept
from .head import Head
from .plan import LinearPlan
from .products import add_columns, add_product, add_product_in_place, project_back


def scale_rows(directions: Tensor, rows: Tensor, scale: Tensor, backend: str) -> Tensor:
    """(N0, H): directions[rows] times scale (N,); rows that are not scored are already zeros."""
    everywhere = scale.new_zeros(directions.shape[0]).index_copy_(0, rows, scale)
    return scale_kept(directions, everywhere[:, None], backend)


class WeightGradient:
    """Sum over chunks of G^T @ hidden, straight from the GEMMs.

    Several chunks add up in `accum_dtype`. Where that is float32 beside 16-bit operands, no chunk's product is rounded
    to 16 bits before it is summed. A single chunk needs no sum and is rounded once, by its GEMM.
    """

    def __init__(self, head: Head, plan: LinearPlan, accum_dtype: torch.dtype):
        weight, chunks = head.weight, plan.weight_chunks
        self.empty = head.empty
        self.total = head.empty(tuple(weight.shape), weight.dtype if chunks <= 1 else accum_dtype)
        if not chunks:
            self.total.zero_()
        self.first = True

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Adds gradient (n, V)^T @ hidden (n, H)."""
        add = add_product if self.total.dtype != gradient.dtype else add_product_in_place
        add(self.total, gradient, hidden, self.first)
        self.first = False

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """The sum, rounded once."""
        if self.total.dtype == dtype:
            return self.total
        return self.empty(tuple(self.total.shape), dtype).copy_(self.total)


@dataclass
class Gradients:
    """What a call accumulates; None where no gradient was asked for."""

    hidden: Tensor | None  # (N0, H), zeros where nothing is scored
    weight: WeightGradient | None
    bias: Tensor | None  # (V,) float32

    def add(self, head: Head, gradient: Tensor, hidden: Tensor, rows: Tensor) -> None:
        """Adds a chunk: its d/dlogits (n, V), its hidden states (n, H), and their rows (n,) of the batch."""
        if self.hidden is not None:
            d_hidden = project_back(gradient, head.weight)
            if head.shard is not None:
                d_hidden = head.shard.all_reduce(d_hidden.to(head.acc_dtype))
            self.hidden.index_copy_(0, rows, d_hidden.to(self.hidden.dtype))
        if self.weight is not None:
            self.weight.add(gradient, hidden)
        if self.bias is not None:
            add_columns(self.bias, gradient)


def start_gradients(
    head: Head, plan: LinearPlan, hidden_shape: tuple[int, int], hidden_dtype: torch.dtype, accum_dtype: torch.dtype
) -> Gradients:
    """Empty gradients of what the plan asks for."""
    device = head.weight.device
    return Gradients(
        torch.zeros(hidden_shape, dtype=hidden_dtype, device=device) if plan.hidden_gradient else None,
        WeightGradient(head, plan, accum_dtype) if plan.weight_gradient else None,
        torch.zeros(head.vocab, dtype=head.acc_dtype, device=device) if plan.bias_gradient else None,
    )
