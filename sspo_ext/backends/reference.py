# SPDX-License-Identifier: Apache-2.0
"""The specification: plain torch, differentiable by autograd, exact in float64.

Every other backend is tested against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.registry import PairScores, get_pair_formula


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it runs everywhere."""
    return None


def map_logits(x: Tensor, a: float, c: float) -> Tensor:
    """Scale, softcap and temperature in one map: a * x, or c * tanh(a * x) when there is a softcap."""
    return a * x if c == 0 else c * torch.tanh(a * x)


def _log_probs(logits: Tensor, rows: Tensor, a: float, c: float) -> Tensor:
    """(N, V) log_softmax(map(logits)) of the rows, in float32, in float64 for float64 logits."""
    x = logits.reshape(-1, logits.shape[-1])[rows]
    if x.dtype != torch.float64:
        x = x.float()
    if c == 0 and a > 1:
        # a * x may be beyond the dtype, and the differences from the largest logit are what a softmax is of
        x = x - x.detach().amax(-1, keepdim=True)
    return map_logits(x, a, c).log_softmax(-1)


def token_logps(
    logits: Tensor,  # (B, T, V)
    rows: Tensor,  # (N,) int64
    labels: Tensor,  # (N,) int64
    a: float,
    c: float,
) -> Tensor:  # (N,) float32, float64 for float64 logits
    """log_softmax(map(logits))[row, label]."""
    return _log_probs(logits, rows, a, c).gather(-1, labels[:, None]).squeeze(-1)


def row_reductions(
    logits: Tensor,  # (B, T, V)
    rows: Tensor,  # (N,) int64
    ref_logits: Tensor | None,  # (B, T, V): of the reference, a constant, mapped as the logits are
    a: float,
    c: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # entropy, sum_p2, kl; (N,) each, float32 (float64 for float64 logits)
    """-sum p log p, sum p^2 and sum q (log q - log p) over the vocabulary; 0 log 0 = 0."""
    logp = _log_probs(logits, rows, a, c)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    if ref_logits is None:
        return entropy, p.square().sum(-1), None
    logq = _log_probs(ref_logits.detach(), rows, a, c)
    q = logq.exp()
    return entropy, p.square().sum(-1), torch.where(q > 0, q * (logq - logp), 0.0).sum(-1)


def step_sums(
    logps: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    step_of_row: Tensor,  # (N,) int64
    num_steps: int,
) -> Tensor:  # (S,)
    """S_k = sum of w * logp over the rows of step k; an empty step is 0."""
    weighted = logps if weights is None else weights.to(logps.dtype) * logps
    # added one by one in float32, the sum of 64,000 tokens would be off by 2
    exact = weighted if weighted.device.type == "mps" else weighted.double()
    return exact.new_zeros(num_steps).index_add(0, step_of_row, exact).to(logps.dtype)


def pair_losses(
    sums: Tensor,  # (S,)
    counts: Tensor,  # (S,) int
    ref: Tensor | None,  # (S,)
    pair_index: Tensor,  # (P, 2) int
    margins: Tensor | None,  # (P,)
    labels: Tensor | None,  # (P,)
    formula: str,
    options: list[float],
    label: float,
) -> Tensor:  # (P,)
    """Unweighted loss of each pair, 0 for a pair with an empty step."""
    u = sums if ref is None else sums - ref.to(sums.dtype)
    winner, loser = pair_index.long().unbind(1)
    valid = (counts[winner] > 0) & (counts[loser] > 0)
    n = counts.clamp(min=1).to(sums.dtype)
    zeros = torch.zeros_like(u[winner])
    definition = get_pair_formula(formula)
    scores = PairScores(
        # a pair with an empty step is evaluated at 0 and then dropped, so that no NaN reaches the gradient
        torch.where(valid, u[winner], zeros),
        torch.where(valid, u[loser], zeros),
        n[winner],
        n[loser],
        zeros if margins is None else margins.to(sums.dtype),
        zeros + label if labels is None else labels.to(sums.dtype),
    )
    losses = definition.fn(scores, **dict(zip(definition.options, options, strict=True)))
    return torch.where(valid, losses, zeros)
