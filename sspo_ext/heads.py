"""The losses as functions of step scores: one definition each, in torch ops, differentiated by autograd.

`python -m sspo_ext.backends.generate` traces these definitions and their autograd derivatives and writes the fused
forms (csrc/heads_generated.h, backends/triton/heads_generated.py), so no loss is written twice by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_choice, check_positive, describe


class PairScores(NamedTuple):
    """What a pair head sees of P pairs; every field broadcasts against (P,)."""

    u_w: Tensor  # winner's S - S_ref (S alone without a reference)
    u_l: Tensor  # loser's
    n_w: Tensor  # winner's scored tokens, at least 1
    n_l: Tensor
    margin: Tensor  # in units of the reward beta * u
    label: Tensor  # probability that the winner is the better step: 1 - label_smoothing, or a soft label


@dataclass(frozen=True)
class PairHead:
    """A pair loss: its definition, and what it may be asked for."""

    name: str
    fn: Callable[..., Tensor]  # (PairScores, **options) -> (P,)
    options: Mapping[str, float]  # option -> default, in the order kernels take them; beta first
    reference: Literal["optional", "forbidden"]
    soft_labels: bool  # whether label_smoothing and soft_labels mean anything
    per_token_reward: bool  # rewards in the metrics are beta * u / n
    formula: str
    source: str

    def check_options(self, beta: float, given: Mapping[str, float]) -> list[float]:
        """Option values in kernel order. An option that this loss does not have raises."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            has = ", ".join(self.options)
            raise TypeError(
                f"{unknown[0]}: neither a common option nor one of loss_type {self.name!r} (which has {has})"
            )
        values = [given.get(name, default) for name, default in {**self.options, "beta": beta}.items()]
        for name, value in zip(self.options, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {describe(value)}")
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        check_positive("beta", beta)
        return [float(v) for v in values]


PAIR_HEADS: dict[str, PairHead] = {}
MAX_OPTIONS = 4


def _pair_head(name, *, options, formula, source, reference="optional", soft_labels=False, per_token_reward=False):
    def register(fn):
        assert next(iter(options)) == "beta" and len(options) <= MAX_OPTIONS
        PAIR_HEADS[name] = PairHead(name, fn, options, reference, soft_labels, per_token_reward, formula, source)
        return fn

    return register


def head_id(name: str) -> int:
    """The number kernels know a head by: its place in PAIR_HEADS."""
    return list(PAIR_HEADS).index(name)


def get_pair_head(name: str) -> PairHead:
    check_choice("loss_type", name, tuple(PAIR_HEADS))
    return PAIR_HEADS[name]


def _logistic(z: Tensor, label: Tensor) -> Tensor:
    return -label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z)


@_pair_head(
    "sigmoid",
    options={"beta": 0.1},
    soft_labels=True,
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (u_w - u_l) - margin",
    source="DPO (arXiv 2305.18290); label smoothing: cDPO; per step: Step-DPO (2406.18629), Segment-Supervised PO "
    "(2508.08550)",
)
def _sigmoid(s: PairScores, beta):
    return _logistic(beta * (s.u_w - s.u_l) - s.margin, s.label)


@_pair_head(
    "hinge",
    options={"beta": 0.1},
    formula="max(0, 1 - z),  z = beta (u_w - u_l) - margin",
    source="RSO (arXiv 2309.06657), SLiC (2305.10425)",
)
def _hinge(s: PairScores, beta):
    return torch.relu(1 - (beta * (s.u_w - s.u_l) - s.margin))


@_pair_head(
    "ipo",
    options={"beta": 0.1},
    formula="(u_w / n_w - u_l / n_l - margin / beta - 1 / (2 beta))^2",
    source="IPO (arXiv 2310.12036); per-token means as in TRL, which cites its authors",
)
def _ipo(s: PairScores, beta):
    return torch.square(s.u_w / s.n_w - s.u_l / s.n_l - s.margin / beta - 1 / (2 * beta))


@_pair_head(
    "simpo",
    options={"beta": 2.0, "simpo_gamma": 0.5},
    reference="forbidden",
    soft_labels=True,
    per_token_reward=True,
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (S_w / n_w - S_l / n_l) - simpo_gamma - margin",
    source="SimPO (arXiv 2405.14734); gamma is in units of the reward, as in TRL's CPOTrainer",
)
def _simpo(s: PairScores, beta, simpo_gamma):
    return _logistic(beta * (s.u_w / s.n_w - s.u_l / s.n_l) - simpo_gamma - s.margin, s.label)
