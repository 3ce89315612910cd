# SPDX-License-Identifier: Apache-2.0
"""Sums of token log-probs over steps and other segments of rows, differentiable and in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from .. import backends
from .._checks import check_device, check_float, check_kind, check_shape, describe
from ..backends import ops, reference
from ..layout.steps import StepLayout


@dataclass(frozen=True, eq=False)
class StepLogps:
    """Log-probabilities of a batch's steps and of their tokens.

    16-bit values, of a cache for example, are widened to float32.

    Examples:
        >>> logps = step_logps(logits, layout)
        >>> per_token = logps.means  # (S,)
    """

    sums: Tensor  # (S,) float32 (float64 for float64 logits): sum of w * log pi over the step, 0 for an empty one
    counts: Tensor  # (S,) int32: scored tokens
    tokens: Tensor  # (N,) float32 (float64): log pi of each scored token, in row order
    entropy: Tensor | None = None  # (N,) like tokens: -sum_v pi_v log pi_v of each row, in nats
    sum_p2: Tensor | None = None  # (N,): sum_v pi_v^2, in [1 / V, 1]
    kl: Tensor | None = None  # (N,): KL(reference || pi), in nats

    def __post_init__(self):
        # no loss may add up or average in 16 bits
        for name in ("sums", "tokens", "entropy", "sum_p2", "kl"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                object.__setattr__(self, name, value.float())

    @classmethod
    def from_tokens(cls, tokens: Tensor, layout: StepLayout, *, entropy: Tensor | None = None) -> StepLogps:
        """Step log-probs of token log-probs that an engine has computed; differentiable in both.

        Every loss that takes StepLogps takes what comes back.

        Args:
            tokens: (B, T) float aligned with the layout's tokens, (total,) of a packed layout, or (N,) in row order.
                What stands at unscored tokens is not read.
            layout: StepLayout; `StepLayout.from_response` where there are no labels.
            entropy: of each token's distribution, in the same forms.

        Returns:
            StepLogps in float32 (float64 for float64 log-probs).

        Raises:
            TypeError: An argument is no float tensor, or no StepLayout.
            ValueError: A shape or device does not fit.

        Examples:
            >>> layout = StepLayout.from_response(torch.ones(1, 3), torch.tensor([[0, 0, 1]]))
            >>> StepLogps.from_tokens(torch.tensor([[-1.0, -2.0, -4.0]]), layout).sums
            tensor([-3., -4.])
        """
        check_kind("layout", layout, StepLayout, "a StepLayout")
        rows = _rows("logps", tokens, layout)
        return cls(
            sums_over_steps(rows, layout), layout.counts, rows,
            None if entropy is None else _rows("entropy", entropy, layout).to(rows.dtype),
        )  # fmt: skip

    @property
    def means(self) -> Tensor:
        """(S,): sums / counts, 0 for an empty step."""
        return self.sums / self.counts.clamp(min=1)


def _rows(name: str, values: Tensor, layout: StepLayout) -> Tensor:
    """(N,) in row order and at least float32, from any form of `StepLogps.from_tokens`; differentiable."""
    check_float(name, values, ndim=(1, 2))
    check_device(name, values, layout.device, "the layout")
    rows = aligned_rows(name, values, layout, (layout.num_rows,))
    if rows is None:
        rows = values
    if rows.shape != (layout.num_rows,):
        raise ValueError(f"{name}: expected ({layout.num_rows},) rows or {layout.shape} tokens, got {describe(values)}")
    return rows if rows.dtype == torch.float64 else rows.float()


def aligned_rows(name: str, value: Tensor, layout: StepLayout, others: tuple[int, ...]) -> Tensor | None:
    """(N,) in row order from (B, T) values aligned with the labels, or (total,) of a packed batch.

    None for another form; `others` are the lengths of 1-D values of other forms.
    """
    packed = value.ndim == 1 and layout.shape == (1, value.shape[0]) and value.shape[0] not in others
    if value.ndim != 2 and not packed:
        return None
    check_shape(name, value if value.ndim == 2 else value[None], layout.shape)
    return value.reshape(-1)[layout.places]


def with_reductions(
    tokens: Tensor, sums: Tensor, layout: StepLayout, values: Sequence[Tensor | None], wanted: tuple[bool, bool, bool]
) -> StepLogps:
    """StepLogps; of entropy, sum_p2 and kl it has those that are wanted."""
    entropy, sum_p2, kl = (value if wants else None for value, wants in zip(values, wanted, strict=True))
    return StepLogps(sums, layout.counts, tokens, entropy, sum_p2, kl)


class StepSums(torch.autograd.Function):
    """(N,) token log-probs -> (S,) step sums by the backend's ordered reduction."""

    @staticmethod
    def forward(ctx, tokens: Tensor, layout: StepLayout, backend: str):
        ctx.layout = layout
        return launch_sums(tokens, in_dtype(layout.weights, tokens.dtype), layout.step_offsets, backend)[1]

    @staticmethod
    def backward(ctx, *upstream):
        (d_sums,) = upstream
        per_row = d_sums[ctx.layout.step_of_row]
        weights = ctx.layout.weights
        return per_row if weights is None else per_row * weights.to(per_row.dtype), None, None


@overload
def in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def in_dtype(values: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def in_dtype(values, dtype):
    """Constants as a launch takes them: contiguous, in this dtype."""
    return None if values is None else values.to(dtype).contiguous()


def launch_sums(
    values: Tensor, weights: Tensor | None, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`step_loss_fwd` without pairs: of (loss, sums, pair losses, coef) only the sums (S,) are of use."""
    no_pairs, no_adj = offsets.new_empty((0, 2)), offsets.new_empty(0)
    return ops.step_loss_fwd(
        values, weights, offsets, None, no_pairs, torch.zeros_like(offsets), no_adj, None, None, None,
        values.new_zeros(()), "sigmoid", [1.0], 1.0, backend,
    )  # fmt: skip


def step_sums(tokens: Tensor, layout: StepLayout, backend: str) -> Tensor:
    """(S,): sum of w * value over the rows of each step, in row order; differentiable in the values (N,)."""
    if backend == "reference":
        return reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    return StepSums.apply(tokens, layout, backend)


def sums_over_steps(values: Tensor, layout: StepLayout) -> Tensor:
    """`step_sums` by the backend that "auto" selects."""
    values = values if values.dtype == torch.float64 else values.float()
    name = backends.select("auto", values.device.type, values.dtype)
    return step_sums(values if name == "reference" else values.contiguous(), layout, name)


def segment_sums(values: Tensor, offsets: Tensor, of_row: Tensor | None, backend: str) -> Tensor:
    """(U,) sums of constants (N,) by the backend's ordered reduction: the same bits with any number of threads."""
    if backend == "reference":
        assert of_row is not None
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
    def backward(ctx, *upstream):
        return upstream[0].expand(ctx.size), None, None


def total(values: Tensor, step_offsets: Tensor, backend: str) -> Tensor:
    """(): sum of (N,) values, differentiable; in a fixed order, except on the reference backend."""
    return values.sum() if backend == "reference" else OrderedTotal.apply(values, step_offsets, backend)
