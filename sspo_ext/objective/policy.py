# SPDX-License-Identifier: Apache-2.0
"""A policy loss over scored rows: its formula, its constants, and its sum.

Only the log-probs vary. Where the backend has the kernel, `evaluate` gives loss and gradient in one launch. Elsewhere
autograd differentiates torch operations on the logits route, `Dual` inside the linear route's op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .. import backends
from ..backends import ops
from ..formulas.policy import KL_ESTIMATORS, MAX_LOG_RATIO, POLICY_FORMULAS, PolicyScores
from ..layout.steps import StepLayout
from .idle import offsets_among
from .sums import segment_sums, total
from .values import copied


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of rows that share one ratio."""

    offsets: Tensor  # (U + 1,) int32, CSR over rows
    of_row: Tensor | None  # (N,) int64; kernels need none
    host_offsets: Tensor  # (U + 1,) int64

    def index(self, num_rows: int) -> Tensor:
        """(N,) int64: the segment of each row."""
        if self.of_row is not None:
            return self.of_row
        every = torch.arange(self.offsets.shape[0] - 1, device=self.offsets.device)
        return every.repeat_interleave(self.offsets[1:] - self.offsets[:-1], output_size=num_rows)


@dataclass(frozen=True, eq=False)
class PolicyProblem:
    """A policy loss over N rows: everything but the log-probs."""

    formula: str
    options: tuple[float, ...]
    kl_estimator: str
    kl_coef: float
    entropy_coef: float
    length_normalize: bool  # a segment's ratio is exp of its mean log-ratio, not of the sum
    advantage: Tensor  # (N,)
    old: Tensor | None  # (N,)
    ref: Tensor | None  # (N,)
    scale: Tensor  # (N,): token weight, over the tokens of its step or sequence; 0 where the token does not count
    norm: Tensor  # (): 1 / number of tokens, steps or sequences of the last mean
    segments: Segments | None = field(repr=False)  # None: each token has its own ratio
    step_offsets: Tensor = field(repr=False)  # (S + 1,) int32
    backend: str
    idle: np.ndarray | None = field(repr=False, default=None)  # (N,) bool: rows that no gradient reaches, if known
    skipped: Tensor | None = field(repr=False, default=None)  # (N,) bool: the same, if their log-probs are not wanted

    def only(self, kept: np.ndarray, places: Tensor, step_offsets: Tensor) -> PolicyProblem:
        """The loss of some rows alone, which are whole segments: rows `kept` (n,), ascending, and on the device too."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, places)

        segments = self.segments
        if segments is not None:
            offsets = torch.from_numpy(offsets_among(segments.host_offsets.numpy(), kept))
            segments = Segments(copied(offsets.to(torch.int32), places.device), None, offsets)
        return replace(
            self, advantage=pick(self.advantage), old=pick(self.old), ref=pick(self.ref), scale=pick(self.scale),
            segments=segments, step_offsets=step_offsets, idle=None, skipped=None,
        )  # fmt: skip

    def part(self, start: int, end: int) -> PolicyProblem:
        """Rows [start, end), which are whole segments."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:end]

        segments = self.segments
        if segments is not None:
            first, last = torch.searchsorted(segments.host_offsets, torch.tensor([start, end], device="cpu")).tolist()
            segments = Segments(
                segments.offsets[first : last + 1] - start,
                None if segments.of_row is None else segments.of_row[start:end] - first,
                segments.host_offsets[first : last + 1] - start,
            )
        return replace(
            self, advantage=cut(self.advantage), old=cut(self.old), ref=cut(self.ref), scale=cut(self.scale),
            segments=segments,
        )  # fmt: skip

    def log_ratio(self, logp: Tensor) -> Tensor:
        """(N,): log pi - log old of each token, or of its segment.

        The value is the segment's. The gradient goes through the token's own log-prob (GSPO-token, arXiv 2507.18071,
        section 4.3), so that each token is moved by its own advantage. Where all advantages and weights of a segment
        are equal, this is the gradient of the segment's ratio.
        """
        fixed = logp.detach()
        if self.segments is None:
            return torch.clamp(logp - (fixed if self.old is None else self.old), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        offsets, of_row = self.segments.offsets, self.segments.index(fixed.shape[0])
        count = (offsets[1:] - offsets[:-1]).clamp(min=1).to(fixed.dtype)
        moved = logp - fixed
        if not self.length_normalize:
            moved = moved * count[of_row]
        if self.old is None:
            return moved
        sums = segment_sums(fixed - self.old, offsets, of_row, self.backend)
        if self.length_normalize:
            sums = sums / count
        return torch.clamp(moved + sums[of_row], -MAX_LOG_RATIO, MAX_LOG_RATIO)

    def surrogate(self, logp: Tensor) -> Tensor:
        """(N,): the formula without KL and entropy."""
        definition = POLICY_FORMULAS[self.formula]
        # a formula without a ratio does not read it
        ratio = torch.exp(self.log_ratio(logp)) if definition.has_ratio else cast(Tensor, None)
        return definition.fn(
            PolicyScores(logp, ratio, self.advantage), **dict(zip(definition.options, self.options, strict=True))
        )

    def kl(self, logp: Tensor) -> Tensor:
        """(N,): the estimate of KL(pi || ref) at each token."""
        assert self.ref is not None
        return KL_ESTIMATORS[self.kl_estimator](logp - self.ref)

    def rows(self, logp: Tensor) -> Tensor:
        """(N,): formula and KL term of each token, before scale and norm."""
        terms = self.surrogate(logp)
        return terms + self.kl_coef * self.kl(logp) if self.kl_coef else terms

    def total(self, rows: Tensor) -> Tensor:
        """(): sum of scale * rows, times the norm."""
        return total(rows * self.scale, self.step_offsets, self.backend) * self.norm

    @property
    def fused(self) -> bool:
        """Whether the backend computes it in a kernel."""
        return backends.has_policy_kernels(self.backend)

    def evaluate(self, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss () and gradient in one launch, where the backend has the kernel.

        The gradient is d loss / d logp (N,), or with an entropy bonus the five numbers of each row's gradient (N, 5).
        """
        return ops.policy_loss_fwd(
            logp, self.old, self.ref if self.kl_coef else None, entropy if self.entropy_coef else None, self.advantage,
            self.scale, self.norm, None if self.segments is None else self.segments.offsets, self.formula,
            list(self.options), self.length_normalize, self.kl_estimator, self.kl_coef, self.entropy_coef, self.backend,
        )  # fmt: skip

    def loss(self, logp: Tensor, entropy: Tensor | None) -> Tensor:
        """(): the loss of token log-probs (N,) and, with a coefficient, of the rows' entropy (N,)."""
        if self.fused:
            return FusedLoss.apply(logp, entropy, self)
        rows = self.rows(logp)
        if not self.entropy_coef:
            return self.total(rows)
        assert entropy is not None
        return self.total(rows - self.entropy_coef * entropy)


class FusedLoss(torch.autograd.Function):
    """(N,) token log-probs, (N,) entropy -> loss (), by the backend's kernel."""

    @staticmethod
    def forward(ctx, logp: Tensor, entropy: Tensor | None, problem: PolicyProblem) -> Tensor:
        loss, coefs = problem.evaluate(logp, entropy)
        ctx.save_for_backward(coefs)
        return loss

    @staticmethod
    def backward(ctx, *upstream):
        # never a second derivative: the log-probs' own backward refuses create_graph
        (coefs,) = ctx.saved_tensors
        gradient = coefs * upstream[0]
        if gradient.ndim == 1:
            return gradient, None, None
        return gradient[:, 0].contiguous(), -gradient[:, 2], None


def pack_problem(problem: PolicyProblem) -> tuple:
    """A problem as the linear route's op takes it, in the order of POLICY_SCHEMA.

    The norm is multiplied into the scale.
    """
    units = problem.segments
    if units is not None and problem.fused:
        units = replace(units, of_row=None)
    return (
        *((None,) * 3 if units is None else (units.offsets, units.of_row, units.host_offsets)), problem.step_offsets,
        problem.advantage, problem.old, problem.ref, problem.scale * problem.norm, problem.formula,
        list(problem.options), problem.length_normalize, problem.kl_estimator, problem.kl_coef, problem.entropy_coef,
    )  # fmt: skip


POLICY_SCHEMA = (
    "Tensor? unit_offsets, Tensor? unit_of_row, Tensor? host_unit_offsets, Tensor step_offsets, Tensor advantage, "
    "Tensor? old, Tensor? ref, Tensor scale, str formula, float[] options, bool length_normalize, str kl_estimator, "
    "float kl_coef, float entropy_coef"
)


def unpack_problem(packed: Sequence, backend: str) -> PolicyProblem:
    """The problem that `pack_problem` packed; its norm is 1."""
    (
        unit_offsets, unit_of_row, host_unit_offsets, step_offsets, advantage, old, ref, scale, formula, options,
        length_normalize, kl_estimator, kl_coef, entropy_coef,
    ) = packed  # fmt: skip
    return PolicyProblem(
        formula, tuple(options), kl_estimator, kl_coef, entropy_coef, length_normalize, advantage, old, ref, scale,
        scale.new_ones(()), None if unit_offsets is None else Segments(unit_offsets, unit_of_row, host_unit_offsets),
        step_offsets, backend,
    )  # fmt: skip


def segments_of(layout: StepLayout, level: str) -> Segments:
    """The layout's steps, or its sequences, as segments."""
    if level == "step":
        return Segments(layout.step_offsets, layout.step_of_row, layout.host_step_offsets)

    return Segments(layout.sequence_offsets, None, layout.host_sequence_offsets)
