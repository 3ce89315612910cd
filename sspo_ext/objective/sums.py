"""Sums of token log-probs over steps and other runs of rows, differentiable and in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from ..backends import ops, reference
from ..layout.steps import StepLayout


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


def with_reductions(
    tokens: Tensor, sums: Tensor, layout: StepLayout, values: Sequence[Tensor | None], wanted: tuple[bool, bool, bool]
) -> StepLogps:
    """StepLogps with those of entropy, sum_p2 and kl that are wanted."""
    entropy, sum_p2, kl = (value if wants else None for value, wants in zip(values, wanted, strict=True))
    return StepLogps(sums, layout.counts, tokens, entropy, sum_p2, kl)


class StepSums(torch.autograd.Function):
    """(N,) token log-probs -> (S,) step sums by the backend's ordered reduction."""

    @staticmethod
    def forward(ctx, tokens: Tensor, layout: StepLayout, backend: str):
        ctx.layout = layout
        return launch_sums(tokens, row_weights(layout, tokens.dtype), layout.step_offsets, backend)[1]

    @staticmethod
    def backward(ctx, d_sums):
        per_row = d_sums[ctx.layout.step_of_row]
        weights = ctx.layout.weights
        return per_row if weights is None else per_row * weights.to(per_row.dtype), None, None


def row_weights(layout: StepLayout, dtype: torch.dtype) -> Tensor | None:
    """(N,) token weights as a launch takes them."""
    return None if layout.weights is None else layout.weights.to(dtype).contiguous()


def launch_sums(values: Tensor, weights: Tensor | None, offsets: Tensor, backend: str) -> tuple[Tensor, ...]:
    """`step_loss_fwd` without pairs: of (loss, sums, pair losses, coef) only the sums (S,) mean anything."""
    no_pairs, no_adj = offsets.new_empty((0, 2)), offsets.new_empty(0)
    return ops.step_loss_fwd(
        values, weights, offsets, None, no_pairs, torch.zeros_like(offsets), no_adj, None, None, None,
        values.new_zeros(()), "sigmoid", [1.0], 1.0, backend,
    )  # fmt: skip


def step_sums(tokens: Tensor, layout: StepLayout, backend: str) -> Tensor:
    """(S,): sum of w * value over each step's rows (N,), in row order; differentiable."""
    if backend == "reference":
        return reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    return StepSums.apply(tokens, layout, backend)


def sums_over_steps(values: Tensor, layout: StepLayout) -> Tensor:
    """`step_sums` by whichever backend runs there."""
    values = values if values.dtype == torch.float64 else values.float()
    name = backends.select("auto", values.device.type, values.dtype)
    return step_sums(values if name == "reference" else values.contiguous(), layout, name)


def segment_sums(values: Tensor, offsets: Tensor, of_row: Tensor | None, backend: str) -> Tensor:
    """(U,) sums of constants (N,) by the backend's ordered reduction: the same bits whatever the threads do."""
    if backend == "reference":
        return reference.step_sums(values, None, of_row, offsets.shape[0] - 1)
    return launch_sums(values.contiguous(), None, offsets, backend)[1]


class OrderedTotal(torch.autograd.Function):
    """(N,) -> (), summed step by step and then over steps, in order."""

    @staticmethod
    def forward(ctx, values: Tensor, step_offsets: Tensor, backend: str) -> Tensor:
        ctx.size = values.shape[0]
        sums = segment_sums(values, step_offsets, None, backend)
        whole = torch.zeros_like(step_offsets[:2])
        whole[1:] = sums.shape[0]
        return segment_sums(sums, whole, None, backend).sum()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.expand(ctx.size), None, None


def total(values: Tensor, step_offsets: Tensor, backend: str) -> Tensor:
    """(): sum of (N,) values, differentiable; in a fixed order unless torch itself does it."""
    return values.sum() if backend == "reference" else OrderedTotal.apply(values, step_offsets, backend)
