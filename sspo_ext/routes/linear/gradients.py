# SPDX-License-Identifier: Apache-2.0
"""The gradients of hidden states, weight and bias, added up over the chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shared import scale_kept
from .head import Head
from .plan import LinearPlan


def scale_rows(directions: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """(N0, H): directions[rows] times scale (N,); rows that are not scored are already zeros."""
    everywhere = scale.new_zeros(directions.shape[0]).index_copy_(0, rows, scale)
    return scale_kept(directions, everywhere[:, None])


_BLOCK_BYTES = 4 << 20  # temporaries of the gradients' reductions: about the size of a core's cache


class WeightGradient:
    """Sum over chunks of G^T @ hidden.

    GEMMs add into it directly, except to a 16-bit weight: several 16-bit products are added up in float32, a block of
    vocabulary rows at a time, so that no second (V, H) exists.
    """

    def __init__(self, head: Head, plan: LinearPlan, accum_dtype: torch.dtype):
        weight, chunks = head.weight, plan.weight_chunks
        exact = chunks <= 1 or weight.dtype == head.acc_dtype
        self.total = head.empty(tuple(weight.shape), weight.dtype if exact else accum_dtype)
        if not chunks:
            self.total.zero_()
        self.first = True
        self.straight = weight.dtype == head.acc_dtype
        # oneDNN is half as fast on a transposed 16-bit operand; transposing a block of it costs less
        self.transposed = head.kernels.transposed if head.backend == "cpu" and not self.straight else None
        widest = max(1, weight.shape[1], min(plan.chunk_rows, plan.num_rows))
        self.block = max(1, min(_BLOCK_BYTES, plan.buffer_bytes) // (widest * weight.itemsize))
        self.scratch = (
            None if self.transposed is None else weight.new_empty(self.block * min(plan.chunk_rows, plan.num_rows))
        )

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Adds gradient (n, V)^T @ hidden (n, H)."""
        if self.straight:
            torch.mm(gradient.t(), hidden, out=self.total) if self.first else self.total.addmm_(gradient.t(), hidden)
        else:
            for start in range(0, self.total.shape[0], self.block):
                total, part = self.total[start : start + self.block], gradient[:, start : start + self.block]
                part = part.t() if self.transposed is None else self.transposed(part, self.scratch)
                if self.first and total.dtype == part.dtype:
                    torch.mm(part, hidden, out=total)
                elif self.first:
                    total.copy_(torch.mm(part, hidden))
                else:
                    total.add_(torch.mm(part, hidden))
        self.first = False


@dataclass
class Gradients:
    """What a call accumulates; None where no gradient was asked for."""

    hidden: Tensor | None  # (N0, H), zeros where nothing is scored
    weight: WeightGradient | None
    bias: Tensor | None  # (V,) float32

    def add(self, head: Head, gradient: Tensor, hidden: Tensor, rows: Tensor) -> None:
        """Adds a chunk: its d/dlogits (n, V), its hidden states (n, H), and their rows (n,) of the batch."""
        if self.hidden is not None:
            d_hidden = torch.mm(gradient, head.weight)
            if head.shard is not None:
                d_hidden = head.shard.all_reduce(d_hidden.to(head.acc_dtype))
            self.hidden.index_copy_(0, rows, d_hidden.to(self.hidden.dtype))
        if self.weight is not None:
            self.weight.add(gradient, hidden)
        if self.bias is not None:
            # a block of columns at a time, because a sum in a wider dtype may copy its input first
            budget = min(_BLOCK_BYTES, gradient.nbytes)
            block = max(1, budget // (max(1, len(rows)) * self.bias.itemsize))
            for v in range(0, head.vocab, block):
                self.bias[v : v + block] += gradient[:, v : v + block].sum(0, dtype=self.bias.dtype)


def start_gradients(
    head: Head, plan: LinearPlan, hidden: Tensor, hidden_dtype: torch.dtype, accum_dtype: torch.dtype
) -> Gradients:
    """Empty gradients of what the plan asks for."""
    device = head.weight.device
    return Gradients(
        torch.zeros(hidden.shape, dtype=hidden_dtype, device=device) if plan.hidden_gradient else None,
        WeightGradient(head, plan, accum_dtype) if plan.weight_gradient else None,
        torch.zeros(head.vocab, dtype=head.acc_dtype, device=device) if plan.bias_gradient else None,
    )
