# SPDX-License-Identifier: Apache-2.0
"""A pair loss as a weighted sum of formulas over the same step sums.

One pass over the logits makes the sums; each formula is a small launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import ops, reference
from ..backends.arguments import StepLossArguments
from ..formulas.registry import MAX_OPTIONS
from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from .sums import in_dtype, launch_sums

_NUMBERS = 2 + MAX_OPTIONS  # of a term, as `pack_terms` lays them out

StepLoss = tuple[Tensor, Tensor, Tensor, Tensor]  # loss (), sums (S,), pair losses (P,) or (C, P), d loss/d logp (N,)


@dataclass(frozen=True)
class LossTerm:
    """One formula of the sum, and which of the call's tensors it sees."""

    formula: str
    options: tuple[float, ...]  # in the formula's order
    label: float = 1.0  # probability that the winner is better, where the pairs carry no soft labels
    weight: float = 1.0
    ref: bool = True
    margins: bool = True
    soft_labels: bool = True
    by_winner_tokens: bool = False


@dataclass(frozen=True, eq=False)
class PairLossSpec:
    """What launch 2 computes beside the step sums."""

    pairs: StepPairs
    terms: tuple[LossTerm, ...]
    scale: Tensor  # () multiplies the sum over pairs
    ref: Tensor | None  # (S,)
    winner_token_share: Tensor | None  # (P,) a further factor on pair weights, in the terms by winner tokens

    @property
    def token_pair_weights(self) -> Tensor | None:
        """(P,): pair weights in the terms by winner tokens."""
        share, weights = self.winner_token_share, self.pairs.weights
        return share if share is None or weights is None else share * weights


def pack_terms(terms: tuple[LossTerm, ...]) -> tuple[str, list[float], list[int]]:
    """Terms as an op's schema can express them: their formulas, numbers and flags."""
    numbers, flags = [], []
    for t in terms:
        numbers += [t.weight, t.label, *t.options, *[0.0] * (MAX_OPTIONS - len(t.options))]
        flags.append(t.ref + 2 * t.margins + 4 * t.soft_labels + 8 * t.by_winner_tokens + 16 * len(t.options))
    return ",".join(t.formula for t in terms), numbers, flags


def unpack_terms(formulas: str, numbers: list[float], flags: list[int]) -> list[LossTerm]:
    """The terms that `pack_terms` packed."""
    terms = []
    for i, (formula, flag) in enumerate(zip(formulas.split(","), flags, strict=True)):
        weight, label, *options = numbers[i * _NUMBERS : (i + 1) * _NUMBERS]
        terms.append(
            LossTerm(formula, tuple(options[: flag // 16]), label, weight, *(bool(flag & bit) for bit in (1, 2, 4, 8)))
        )
    return terms


def evaluate_terms(
    step_loss_fwd: Callable[[StepLossArguments], StepLoss],  # a backend's, or the op
    terms: Sequence[LossTerm],
    given: StepLossArguments,  # formula, options and label are taken from the terms
    token_pair_weights: Tensor | None,  # (P,) instead of pair_weights, in terms by winner tokens
) -> StepLoss:
    """The sum of C terms; pair losses are (C, P), unweighted."""
    # not given._replace: torch.compile of torch 2.6 breaks on it
    results = [
        step_loss_fwd(
            StepLossArguments(
                logps=given.logps,
                weights=given.weights,
                step_offsets=given.step_offsets,
                ref=given.ref if t.ref else None,
                pair_index=given.pair_index,
                adj_offsets=given.adj_offsets,
                adj_pairs=given.adj_pairs,
                pair_weights=token_pair_weights if t.by_winner_tokens else given.pair_weights,
                pair_margins=given.pair_margins if t.margins else None,
                pair_labels=given.pair_labels if t.soft_labels else None,
                scale=given.scale if t.weight == 1 else given.scale * t.weight,
                formula=t.formula,
                options=list(t.options),
                label=t.label,
            )
        )
        for t in terms
    ]
    loss, sums, pair_losses, coef = results[0]
    if len(results) == 1:
        return loss, sums, pair_losses[None], coef
    for other in results[1:]:
        loss, coef = loss + other[0], coef + other[3]
    return loss, sums, torch.stack([r[2] for r in results]), coef


def step_loss(
    tokens: Tensor, weights: Tensor | None, layout: StepLayout, spec: PairLossSpec | None, backend: str
) -> StepLoss:
    """Launch 2; without a spec only the sums are computed, and the rest is empty or 0."""
    if spec is None:
        return launch_sums(tokens, weights, layout.step_offsets, backend)
    pairs, dtype = spec.pairs, tokens.dtype

    def launch(given: StepLossArguments) -> StepLoss:
        return ops.step_loss_fwd(*given, backend)

    given = StepLossArguments(
        tokens, weights, layout.step_offsets, in_dtype(spec.ref, dtype), pairs.index, pairs.adj_offsets,
        pairs.adj_pairs, in_dtype(pairs.weights, dtype), in_dtype(pairs.margins, dtype),
        in_dtype(pairs.soft_labels, dtype), in_dtype(spec.scale, dtype), "", [], 1.0,
    )  # fmt: skip
    return evaluate_terms(launch, spec.terms, given, in_dtype(spec.token_pair_weights, dtype))


def mixed_pair_losses(term_losses: Tensor, spec: PairLossSpec) -> Tensor:
    """(P,): the terms' pair losses (C, P) added up with the terms' weights; pair weights are left out."""
    first = spec.terms[0]
    if len(spec.terms) == 1 and first.weight == 1 and not first.by_winner_tokens:
        return term_losses[0]  # as they are: no launch
    rows = []
    for t, losses in zip(spec.terms, term_losses, strict=True):
        if t.by_winner_tokens:
            assert spec.winner_token_share is not None
            losses = losses * spec.winner_token_share.to(losses.dtype)
        rows.append(t.weight * losses)
    return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)


def reference_loss(tokens: Tensor, layout: StepLayout, spec: PairLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sums, term losses (C, P)) from token log-probs, by autograd on plain torch."""
    sums = reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    loss, losses = loss_of_sums(sums, layout, spec)
    return loss, sums, losses


def loss_of_sums(sums: Tensor, layout: StepLayout, spec: PairLossSpec) -> tuple[Tensor, Tensor]:
    """(loss (), term losses (C, P)) from step sums (S,), by autograd on plain torch."""
    pairs = spec.pairs
    losses = torch.stack(
        [
            reference.pair_losses(
                sums,
                layout.counts,
                spec.ref if t.ref else None,
                pairs.index,
                pairs.margins if t.margins else None,
                pairs.soft_labels if t.soft_labels else None,
                t.formula,
                list(t.options),
                t.label,
            )
            for t in spec.terms
        ]
    )
    mixed = mixed_pair_losses(losses, spec)
    weighted = mixed if pairs.weights is None else mixed * pairs.weights.to(mixed.dtype)
    return weighted.sum() * spec.scale.to(mixed.dtype), losses
