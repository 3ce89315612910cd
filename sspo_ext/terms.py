"""A pair loss as a weighted sum of heads over the same step sums: one pass over the logits, a small launch per head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .heads import MAX_OPTIONS
from .pairs import StepPairs

_NUMBERS = 2 + MAX_OPTIONS


@dataclass(frozen=True)
class LossTerm:
    """One head of the sum, and which of the call's tensors it sees."""

    head: str
    options: tuple[float, ...]  # in the head's order
    label: float = 1.0  # probability that the winner is better, where the pairs carry no soft labels
    weight: float = 1.0
    ref: bool = True
    margins: bool = True
    soft_labels: bool = True
    by_winner_tokens: bool = False


@dataclass(frozen=True, eq=False)
class PairLossSpec:
    """What launch 2 computes besides step sums."""

    pairs: StepPairs
    terms: tuple[LossTerm, ...]
    scale: Tensor  # () multiplies the sum over pairs
    ref: Tensor | None  # (S,)
    winner_token_share: Tensor | None  # (P,) what the terms by winner tokens weigh pairs with, beside their weights

    @property
    def token_pair_weights(self) -> Tensor | None:
        """(P,): pair weights of the terms by winner tokens."""
        share, weights = self.winner_token_share, self.pairs.weights
        return share if share is None or weights is None else share * weights


def pack_terms(terms: tuple[LossTerm, ...]) -> tuple[str, list[float], list[int]]:
    """Terms as an op's schema can say them."""
    numbers, flags = [], []
    for t in terms:
        numbers += [t.weight, t.label, *t.options, *[0.0] * (MAX_OPTIONS - len(t.options))]
        flags.append(t.ref + 2 * t.margins + 4 * t.soft_labels + 8 * t.by_winner_tokens + 16 * len(t.options))
    return ",".join(t.head for t in terms), numbers, flags


def unpack_terms(heads: str, numbers: list[float], flags: list[int]) -> list[LossTerm]:
    terms = []
    for i, (head, flag) in enumerate(zip(heads.split(","), flags, strict=True)):
        weight, label, *options = numbers[i * _NUMBERS : (i + 1) * _NUMBERS]
        terms.append(
            LossTerm(head, tuple(options[: flag // 16]), label, weight, *(bool(flag & bit) for bit in (1, 2, 4, 8)))
        )
    return terms


def evaluate_terms(
    step_loss_fwd: Callable,  # a backend's, or the op
    terms,
    logps: Tensor,  # (N,)
    weights: Tensor | None,  # (N,)
    step_offsets: Tensor,
    ref: Tensor | None,  # (S,)
    pair_index: Tensor,  # (P, 2)
    adj_offsets: Tensor,
    adj_pairs: Tensor,
    pair_weights: Tensor | None,  # (P,)
    token_pair_weights: Tensor | None,  # (P,)
    margins: Tensor | None,  # (P,)
    soft_labels: Tensor | None,  # (P,)
    scale: Tensor,  # ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), sums (S,), pair losses (C, P) of the C terms, unweighted, and d loss/d logp (N,)."""
    results = [
        step_loss_fwd(
            logps,
            weights,
            step_offsets,
            ref if t.ref else None,
            pair_index,
            adj_offsets,
            adj_pairs,
            token_pair_weights if t.by_winner_tokens else pair_weights,
            margins if t.margins else None,
            soft_labels if t.soft_labels else None,
            scale if t.weight == 1 else scale * t.weight,
            t.head,
            list(t.options),
            t.label,
        )
        for t in terms
    ]
    loss, sums, pair_losses, coef = results[0]
    if len(results) == 1:
        return loss, sums, pair_losses[None], coef
    for other in results[1:]:
        loss, coef = loss + other[0], coef + other[3]
    return loss, sums, torch.stack([r[2] for r in results]), coef
