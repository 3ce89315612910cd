# SPDX-License-Identifier: Apache-2.0
"""Pieces that several formulas share, written so that nothing overflows or cancels at any finite score."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_EXPONENT = 80.0  # its exp is finite in float32, with room for beta and sums over pairs; TRL clamps there too
MAX_MEAN_LOGP = -1e-6  # closer to 0, the odds of a float32 token mean have no correct digit


def logistic(z: Tensor, label: Tensor) -> Tensor:
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z)."""
    return -label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z)


def log1mexp(m: Tensor) -> Tensor:
    """log(1 - e^m) for m < 0.

    Each branch sees only arguments for which it is accurate. Otherwise the unused branch would put an infinity times
    zero, NaN, into the gradient.
    """
    near = m > -math.log(2)
    small = torch.where(near, m, torch.full_like(m, -1.0))
    large = torch.where(near, torch.full_like(m, -1.0), m)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a token-mean log-prob, which is clamped to -1e-6; the gradient is 0 above that."""
    m = torch.clamp(mean_logp, max=MAX_MEAN_LOGP)
    return m - log1mexp(m)


def bounded_exp(x: Tensor) -> Tensor:
    """e^x with the exponent clamped to 80; the gradient is 0 above that."""
    return torch.exp(torch.clamp(x, max=MAX_EXPONENT))
