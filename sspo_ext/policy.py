"""The policy-gradient losses as functions of token log-probs: one definition each, in torch ops.

A definition is elementwise over scored tokens, given its ratio and constants. Autograd differentiates it on the logits
route, `Dual` inside the linear route's op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import check_choice, describe
from .backends import reference

MAX_LOG_RATIO = 20.0  # exp of it is finite with room to spare; a ratio beyond is a training run that is lost anyway
LEVELS = ("token", "step", "sequence")


class PolicyScores(NamedTuple):
    """What a policy head sees of N tokens; (N,) each."""

    logp: Tensor
    ratio: Tensor  # of the token, or of its step or sequence
    advantage: Tensor  # constant


@dataclass(frozen=True)
class PolicyHead:
    """A policy loss: its definition, and what it may be asked for."""

    name: str
    fn: Callable[..., Tensor]  # (PolicyScores, **options) -> (N,), to be minimised
    options: Mapping[str, float | None]  # option -> default
    has_ratio: bool  # whether old log-probs and a level mean anything
    formula: str
    source: str
    use: str  # where it is the right choice

    def check_options(self, given: Mapping[str, float | None]) -> tuple[float, ...]:
        """Option values in order. One that this loss does not have raises."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            has = ", ".join(self.options) or "none"
            raise TypeError(
                f"{unknown[0]}: neither a common option nor one of loss_type {self.name!r} (which has {has})"
            )
        values = {**self.options, **given}
        for name, value in values.items():
            if value is None and self.options[name] is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {describe(value)}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number, 0 or above, got {value!r}")
        if self.name == "ppo":
            epsilon = values["epsilon"]
            if epsilon > 1:
                raise ValueError(f"epsilon: expected a number in [0, 1], got {epsilon!r}")
            high = values["epsilon_high"] = epsilon if values["epsilon_high"] is None else values["epsilon_high"]
            if values["delta"] is not None and values["delta"] <= 1 + high:
                raise ValueError(f"delta: expected more than 1 + epsilon_high = {1 + high:g}, got {values['delta']!r}")
            values["delta"] = math.inf if values["delta"] is None else values["delta"]
        return tuple(float(v) for v in values.values())


POLICY_HEADS: dict[str, PolicyHead] = {}


def _policy_head(name, *, options, has_ratio, formula, source, use):
    def register(fn):
        POLICY_HEADS[name] = PolicyHead(name, fn, options, has_ratio, formula, source, use)
        return fn

    return register


def get_policy_head(name: str) -> PolicyHead:
    check_choice("loss_type", name, tuple(POLICY_HEADS))
    return POLICY_HEADS[name]


@_policy_head(
    "reinforce",
    options={},
    has_ratio=False,
    formula="-A log pi",
    source="REINFORCE (Williams 1992); summed, exactly -sum_k A_k S_k over steps",
    use="one update for each batch of rollouts",
)
def _reinforce(s: PolicyScores):
    return -(s.advantage * s.logp)


@_policy_head(
    "ppo",
    options={"epsilon": 0.2, "epsilon_high": None, "delta": None},
    has_ratio=True,
    formula="-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)",
    source="PPO-clip (arXiv 1707.06347); epsilon_high: clip-higher of DAPO (2503.14476); delta: dual clip "
    "(1912.09729), under TRL's name; r of a sequence: GSPO (2507.18071)",
    use="several updates for each batch; GRPO, DAPO, Dr. GRPO and GSPO by level, aggregation and advantages",
)
def _ppo(s: PolicyScores, epsilon, epsilon_high, delta):
    clipped = torch.clamp(s.ratio, 1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(torch.clamp(s.ratio, max=delta) * s.advantage, clipped * s.advantage)


@_policy_head(
    "cispo",
    options={"epsilon_high": 5.0},
    has_ratio=True,
    formula="-sg(min(r, epsilon_high)) A log pi",
    source="CISPO (MiniMax-M1, arXiv 2506.13585); epsilon_high bounds r itself, as in TRL",
    use="several updates, where clipping must not silence rare tokens",
)
def _cispo(s: PolicyScores, epsilon_high):
    return -(torch.clamp(s.ratio.detach(), max=epsilon_high) * s.advantage * s.logp)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * torch.square(d),
    "k3": lambda d: torch.expm1(-d) + d,
}
"""Of KL(pi || ref) from a token sampled from pi, by d = log pi - log ref (Schulman 2020, "Approximating KL
divergence").

All but k2 are unbiased as values. Differentiated as a term of a loss, k2 has the expected gradient of the KL, k3 that
of KL(ref || pi), and k1 none: it is for reports."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of rows that share one ratio."""

    offsets: Tensor  # (U + 1,) int32, CSR over rows
    of_row: Tensor  # (N,) int64
    host_offsets: Tensor  # (U + 1,) int64


def segment_sums(values: Tensor, offsets: Tensor, of_row: Tensor | None, backend: str) -> Tensor:
    """(U,) sums of constants (N,) by the backend's ordered reduction: the same bits whatever the threads do."""
    if backend == "reference":
        return reference.step_sums(values, None, of_row, offsets.shape[0] - 1)
    no_pairs, no_adj = offsets.new_empty((0, 2)), offsets.new_empty(0)
    return ops.step_loss_fwd(
        values.contiguous(), None, offsets, None, no_pairs, torch.zeros_like(offsets), no_adj, None, None, None,
        values.new_zeros(()), "sigmoid", [1.0], 1.0, backend,
    )[1]  # fmt: skip


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


@dataclass(frozen=True, eq=False)
class PolicyProblem:
    """A policy loss over N rows, all of it but the log-probs."""

    head: str
    options: tuple[float, ...]
    kl_estimator: str
    kl_coef: float
    entropy_coef: float
    length_normalize: bool  # the ratio of a segment is of the mean log-ratio, not of the sum
    advantage: Tensor  # (N,)
    old: Tensor | None  # (N,)
    ref: Tensor | None  # (N,)
    scale: Tensor  # (N,): token weight over the tokens of what is averaged first; 0 where the token does not count
    norm: Tensor  # (): one over the number of what is averaged last
    segments: Segments | None = field(repr=False)  # None: each token has its own ratio
    step_offsets: Tensor = field(repr=False)  # (S + 1,) int32
    backend: str

    def part(self, start: int, end: int) -> PolicyProblem:
        """Rows [start, end), which are whole segments."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:end]

        segments = self.segments
        if segments is not None:
            first, last = torch.searchsorted(segments.host_offsets, torch.tensor([start, end], device="cpu")).tolist()
            segments = Segments(
                segments.offsets[first : last + 1] - start,
                segments.of_row[start:end] - first,
                segments.host_offsets[first : last + 1] - start,
            )
        return replace(
            self, advantage=cut(self.advantage), old=cut(self.old), ref=cut(self.ref), scale=cut(self.scale),
            segments=segments,
        )  # fmt: skip

    def log_ratio(self, logp: Tensor) -> Tensor:
        """(N,): log pi - log old of each token, or of its segment.

        The value is the segment's; the gradient goes through the token's own log-prob (GSPO-token, arXiv 2507.18071,
        section 4.3), so that each token is moved by its own advantage. Where a segment's advantages and weights are
        equal this is the gradient of the segment's ratio.
        """
        fixed = logp.detach()
        if self.segments is None:
            return torch.clamp(logp - (fixed if self.old is None else self.old), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        offsets, of_row = self.segments.offsets, self.segments.of_row
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
        """(N,): the head alone."""
        head = POLICY_HEADS[self.head]
        ratio = torch.exp(self.log_ratio(logp)) if head.has_ratio else None
        return head.fn(PolicyScores(logp, ratio, self.advantage), **dict(zip(head.options, self.options, strict=True)))

    def kl(self, logp: Tensor) -> Tensor:
        """(N,): the estimate of KL(pi || ref) at each token."""
        return KL_ESTIMATORS[self.kl_estimator](logp - self.ref)

    def rows(self, logp: Tensor) -> Tensor:
        """(N,): head and KL term of each token, before scale and norm; a Tensor or a Dual, as `logp` is."""
        terms = self.surrogate(logp)
        return terms + self.kl_coef * self.kl(logp) if self.kl_coef else terms

    def total(self, rows: Tensor) -> Tensor:
        """(): sum of scale * rows, times the norm."""
        weighted = rows * self.scale
        if self.backend == "reference":
            return weighted.sum() * self.norm
        return OrderedTotal.apply(weighted, self.step_offsets, self.backend) * self.norm

    def loss(self, logp: Tensor, entropy: Tensor | None) -> Tensor:
        rows = self.rows(logp)
        return self.total(rows - self.entropy_coef * entropy if self.entropy_coef else rows)
