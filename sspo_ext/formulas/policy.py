# SPDX-License-Identifier: Apache-2.0
"""The policy-gradient losses as formulas of token log-probs: one definition each, in torch ops.

A definition is elementwise over scored tokens, given their ratios and constants. Triton's kernel is generated from it
(tools/generate_formulas.py). Elsewhere autograd differentiates it on the logits route, `Dual` in the linear route's op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_not_negative
from .other_names import check_loss_name

MAX_LOG_RATIO = 20.0  # its exp is far from overflow; a training run with a larger ratio is lost anyway

MOST_POLICY_OPTIONS = 3

LEVELS = ("token", "step", "sequence")


class PolicyScores(NamedTuple):
    """What a policy formula sees of N tokens; (N,) each."""

    logp: Tensor
    ratio: Tensor  # of the token, or of its step or sequence; None where the formula has no ratio
    advantage: Tensor  # constant


@dataclass(frozen=True)
class PolicyFormula:
    """A policy loss: its definition, and what it takes."""

    name: str
    fn: Callable[..., Tensor]  # (PolicyScores, **options) -> (N,), to be minimised
    options: Mapping[str, float | None]  # option -> default
    has_ratio: bool  # whether it uses old log-probs and a level
    formula: str
    source: str
    use: str  # where it is the right choice
    resolve: Callable[..., tuple[float, ...]] | None = None  # checked options -> their values, where None is one

    def check_options(self, given: Mapping[str, float | None]) -> tuple[float, ...]:
        """Option values in order; TypeError for an option that this loss does not have."""
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
            check_not_negative(name, value)
        if self.resolve is not None:
            return self.resolve(**values)
        return tuple(float(v) for v in values.values() if v is not None)


POLICY_FORMULAS: dict[str, PolicyFormula] = {}


def _policy_formula(name: str, *, options: Mapping[str, float | None], **facts):
    """Registers the decorated definition; `facts` are further fields of PolicyFormula."""

    def register(fn):
        assert len(options) <= MOST_POLICY_OPTIONS and name not in POLICY_FORMULAS
        POLICY_FORMULAS[name] = PolicyFormula(name, fn, options, **facts)
        return fn

    return register


def get_policy_formula(name: str) -> PolicyFormula:
    """The formula of this name; ValueError for an unknown one."""
    check_loss_name(name, POLICY_FORMULAS, policy=True)
    check_choice("loss_type", name, tuple(POLICY_FORMULAS))
    return POLICY_FORMULAS[name]


@_policy_formula(
    "reinforce",
    options={},
    has_ratio=False,
    formula="-A log pi",
    source="REINFORCE (Williams 1992); summed, exactly -sum_k A_k S_k over steps",
    use="one update for each batch of rollouts",
)
def _reinforce(s: PolicyScores):
    return -(s.advantage * s.logp)


def _ppo_options(epsilon: float, epsilon_high: float | None, delta: float | None) -> tuple[float, ...]:
    """Without epsilon_high the range is symmetric; without delta there is no dual clip."""
    if epsilon > 1:
        raise ValueError(f"epsilon: expected a number in [0, 1], got {epsilon!r}")
    high = epsilon if epsilon_high is None else epsilon_high
    if delta is not None and delta <= 1 + high:
        raise ValueError(f"delta: expected more than 1 + epsilon_high = {1 + high:g}, got {delta!r}")
    return float(epsilon), float(high), math.inf if delta is None else float(delta)


@_policy_formula(
    "ppo",
    options={"epsilon": 0.2, "epsilon_high": None, "delta": None},
    resolve=_ppo_options,
    has_ratio=True,
    formula="-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)",
    source="PPO-clip (arXiv 1707.06347); epsilon_high: clip-higher of DAPO (2503.14476); delta: dual clip "
    "(1912.09729), under TRL's name; r of a sequence: GSPO (2507.18071)",
    use="several updates for each batch; GRPO, DAPO, Dr. GRPO and GSPO by level, aggregation and advantages",
)
def _ppo(s: PolicyScores, epsilon, epsilon_high, delta):
    clipped = torch.clamp(s.ratio, 1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(torch.clamp(s.ratio, max=delta) * s.advantage, clipped * s.advantage)


@_policy_formula(
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
"""Estimates of KL(pi || ref) at a token sampled from pi, from d = log pi - log ref (Schulman 2020, "Approximating KL
divergence").

As values k1 and k3 are unbiased. As a term of a loss, the expected gradient of k2 is that of KL(pi || ref), that of k3
is the gradient of KL(ref || pi), and that of k1 is zero, so k1 is for reports.
"""
