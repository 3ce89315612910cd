# SPDX-License-Identifier: Apache-2.0
"""Step preferences from ranked candidates, and token weights for the place where two steps diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_choice, check_count, check_integer, check_not_negative, check_shape
from .node import Candidate, Node

WEIGHTS = ("one", "gap")

MARGINS = ("none", "gap")


@dataclass(frozen=True)
class TracedPair:
    """Two possible steps after the same state, one better than the other.

    Attributes:
        node: the state and all of its candidates.
        winner: the better step.
        loser: the other one.
        weight: the pair's weight in a loss.
        margin: the margin that a loss asks for.
    """

    node: Node
    winner: Candidate
    loser: Candidate
    weight: float
    margin: float

    @property
    def gap(self) -> float:
        """The difference of the two values."""
        return self.winner.value - self.loser.value


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """The options of `pair_candidates`, which documents them.

    Making one raises ValueError or TypeError for a value that does not fit.
    """

    min_gap: float = 0.02
    weight: str = "one"
    margin: str = "none"
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("margin", self.margin, MARGINS)
        check_not_negative("min_gap", self.min_gap)
        if self.max_pairs is not None:
            check_count("max_pairs", self.max_pairs)


def pair_candidates(
    nodes: Sequence[Node],
    *,
    min_gap: float = 0.02,
    weight: str = "one",
    margin: str = "none",
    max_pairs: int | None = None,
) -> list[TracedPair]:
    """Pair the candidates of each node whose values differ; candidates of different nodes are never compared.

    Args:
        nodes: from `trace_candidates` or `nodes_from_rollouts`.
        min_gap: two candidates are paired if their values differ by more than this.
        weight: the weight of a pair: "one", or "gap", the difference of the values.
        margin: the margin of a pair: "none" (0), or "gap".
        max_pairs: the largest number of pairs of one node, those with the largest gaps. None means all.

    Returns:
        The pairs, node after node, and for each node the largest gap first.

    Raises:
        ValueError: if an option does not fit, or a candidate's value is not finite.
        TypeError: if a number has the wrong type.

    Examples:
        >>> right, wrong = Candidate((5,), "19", 3, True, value=1.0), Candidate((6,), "20", 1, True, value=0.0)
        >>> [pair] = pair_candidates([Node(0, 0, (right, wrong))])
        >>> pair.winner.text, pair.gap
        ('19', 1.0)
    """
    PairOptions(min_gap=min_gap, weight=weight, margin=margin, max_pairs=max_pairs)
    pairs = []
    for node in nodes:
        for one in node.candidates:
            if not math.isfinite(one.value):
                raise ValueError(f"nodes: expected finite values, got {one.value} for the candidate {one.text!r}")
        ranked = sorted(node.candidates, key=lambda c: -c.value)
        some = [(a, b) for a, b in combinations(ranked, 2) if a.value - b.value > min_gap and a.text != b.text]
        some.sort(key=lambda pair: pair[1].value - pair[0].value)
        for a, b in some[:max_pairs]:
            gap = a.value - b.value
            pairs.append(TracedPair(node, a, b, gap if weight == "gap" else 1.0, gap if margin == "gap" else 0.0))
    return pairs


def pair_rows(pairs: Sequence[TracedPair], prompts: Sequence[Any], steps: Sequence[Sequence[str]]) -> list[dict]:
    """Make dataset rows of step preferences from pairs.

    Args:
        pairs: from `pair_candidates`.
        prompts: B prompts, texts or chat messages.
        steps: B lists with the texts of each sequence's steps.

    Returns:
        One row for each pair, as `sspo_ext.data.rows.load_preference_rows` reads them; "branch" means that only the
        last step counts. The steps are the texts that the model wrote, with their white space: without it they would be
        other tokens. A row also has "values" of the two steps, and their "logps" by the traced model if known.

    Examples:
        >>> right, wrong = Candidate((5,), "19", 3, True, value=1.0), Candidate((6,), "20", 1, True, value=0.0)
        >>> [row] = pair_rows(pair_candidates([Node(0, 0, (right, wrong))]), ["6 + 13 = ?"], [[]])
        >>> row["chosen"], row["rejected"]
        (['19'], ['20'])
    """
    rows = []
    for pair in pairs:
        before = list(steps[pair.node.sequence][: pair.node.step])
        both = (pair.winner, pair.loser)
        partial = not (pair.winner.ended and pair.loser.ended)
        chosen, rejected = (c.text if c.written is None else c.written for c in both)
        if not partial:  # an end of sequence follows
            chosen, rejected = chosen.rstrip(), rejected.rstrip()
        row = {
            "prompt": prompts[pair.node.sequence],
            "chosen": [*before, chosen],
            "rejected": [*before, rejected],
            "branch": pair.node.step,
            "partial": partial,
            "weight": round(pair.weight, 6),
            "margin": round(pair.margin, 6),
            "values": [float(f"{c.value:.6g}") for c in both],
        }
        if not all(step[-1:].isspace() for step in before):
            row["step_separator"] = ""
        logps = [c.logp for c in both if c.logp is not None]
        if len(logps) == len(both):
            row["logps"] = [round(logp, 4) for logp in logps]
        rows.append(row)
    return rows


def divergence_index(winner: Sequence[int], loser: Sequence[int]) -> int | None:
    """Find the first place where two steps differ.

    Args:
        winner: token ids of one step.
        loser: token ids of the other.

    Returns:
        The index, or None if one step is the beginning of the other.

    Examples:
        >>> divergence_index([4, 5, 6], [4, 7])
        1
    """
    return next((i for i, (a, b) in enumerate(zip(winner, loser, strict=False)) if a != b), None)


def divergence_weights(labels: Tensor, step_ids: Tensor, pairs: Tensor) -> Tensor:
    """Compute token weights with which only the first differing token of each paired step counts.

    Two steps after the same tokens are then compared by two logits of one position. What follows a wrong token is no
    longer pushed down with it. Pass the result as `StepLayout.from_step_ids(labels, step_ids, token_weights=...)`. The
    method is ours.

    Args:
        labels: (B, T) int, as for `StepLayout.from_step_ids`.
        step_ids: (B, T) int, as for `StepLayout.from_step_ids`.
        pairs: (P, 2) int: (winner, loser) as indices of the batch's steps, numbered sequence after sequence.

    Returns:
        (B, T) float32 on the labels' device: 1 where the two steps of a pair first differ, else 0.

    Raises:
        ValueError: if a shape or index does not fit, one step of a pair is the beginning of the other, or a step is in
            two pairs that differ at different places; then give each pair steps of its own.
        TypeError: if a tensor is not int.

    Examples:
        >>> labels, steps = torch.tensor([[9, 4, 5, 6], [9, 4, 7, 6]]), torch.tensor([[-1, 0, 0, 0]] * 2)
        >>> divergence_weights(labels, steps, torch.tensor([[0, 1]]))
        tensor([[0., 0., 1., 0.],
                [0., 0., 1., 0.]])
    """
    check_integer("labels", labels, ndim=2)
    check_integer("step_ids", step_ids, ndim=2)
    check_shape("step_ids", step_ids, tuple(labels.shape))
    check_integer("pairs", pairs, ndim=2)
    ids, numbers = labels.tolist(), step_ids.tolist()
    places: list[list[tuple[int, int]]] = []
    for b, row in enumerate(numbers):
        of = {k: [] for k in range(max(row, default=-1) + 1)}
        for t, k in enumerate(row):
            if k >= 0:
                of[k].append((b, t))
        places += of.values()
    weights = torch.zeros(labels.shape, device="cpu")
    chosen: dict[int, int] = {}
    for p, pair in enumerate(pairs.tolist()):
        if any(not 0 <= s < len(places) for s in pair):
            raise ValueError(f"pairs: expected indices below {len(places)}, the number of steps, got {pair} at {p}")
        at = divergence_index(*([ids[b][t] for b, t in places[s]] for s in pair))
        if at is None:
            raise ValueError(f"pairs: pair {p} has a step that is the beginning of the other, so they never differ")
        for s in pair:
            if chosen.setdefault(s, at) != at:
                raise ValueError(f"pairs: step {s} first differs in one place in one pair, and in another in pair {p}")
            weights[places[s][at]] = 1.0
    return weights.to(labels.device)
