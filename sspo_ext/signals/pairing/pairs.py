"""Step preferences from candidates that were ranked, and the weights that leave of a step what a pair is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_choice, check_count, check_integer, check_not_negative, check_shape
from .candidates import Candidate, Node

WEIGHTS = ("one", "gap")

MARGINS = ("none", "gap")


@dataclass(frozen=True)
class TracedPair:
    """Two steps after the same state, the better one first."""

    node: Node
    winner: Candidate
    loser: Candidate
    weight: float
    margin: float

    @property
    def gap(self) -> float:
        return self.winner.value - self.loser.value


def pair_candidates(
    nodes: Sequence[Node],
    *,
    min_gap: float = 0.02,
    weight: str = "one",
    margin: str = "none",
    max_pairs: int | None = None,
) -> list[TracedPair]:
    """Every two candidates of one node whose values are more than `min_gap` apart; never across nodes.

    weight     of a pair in the loss: "one", or "gap", the difference of the values
    margin     that the loss asks for: "none" (0), or "gap"
    max_pairs  of one node: those with the largest gaps
    """
    check_pair_options(min_gap=min_gap, weight=weight, margin=margin, max_pairs=max_pairs)
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


def check_pair_options(
    *, min_gap: float = 0.02, weight: str = "one", margin: str = "none", max_pairs: int | None = None
) -> None:
    """What `pair_candidates` can say of its options."""
    check_choice("weight", weight, WEIGHTS)
    check_choice("margin", margin, MARGINS)
    check_not_negative("min_gap", min_gap)
    if max_pairs is not None:
        check_count("max_pairs", max_pairs)


def pair_rows(
    pairs: Sequence[TracedPair],
    prompts: Sequence[Any],  # (B,) texts or chat messages
    steps: Sequence[Sequence[str]],  # (B,) the texts of each sequence's steps
) -> list[dict]:
    """Rows of step preferences for `sspo_ext.data.rows.load_preference_rows` (`branch`: only the last step counts).

    Beside its keys: "values" of the two steps, and "logps", by the model that was traced, if they are known.
    """
    rows = []
    for pair in pairs:
        before = list(steps[pair.node.sequence][: pair.node.step])
        both = (pair.winner, pair.loser)
        row = {
            "prompt": prompts[pair.node.sequence],
            "chosen": [*before, pair.winner.text],
            "rejected": [*before, pair.loser.text],
            "branch": pair.node.step,
            "partial": not (pair.winner.ended and pair.loser.ended),
            "weight": round(pair.weight, 6),
            "margin": round(pair.margin, 6),
            "values": [float(f"{c.value:.6g}") for c in both],
        }
        if all(c.logp is not None for c in both):
            row["logps"] = [round(c.logp, 4) for c in both]
        rows.append(row)
    return rows


def divergence_index(winner: Sequence[int], loser: Sequence[int]) -> int | None:
    """The first place where two steps differ; None where one is the beginning of the other."""
    return next((i for i, (a, b) in enumerate(zip(winner, loser, strict=False)) if a != b), None)


def divergence_weights(
    labels: Tensor,  # (B, T) int, as for StepLayout.from_step_ids
    step_ids: Tensor,  # (B, T) int
    pairs: Tensor,  # (P, 2) int: (winner, loser) among the batch's steps, sequence after sequence
) -> Tensor:  # (B, T) float32: 1 where a pair's two steps first differ, else 0
    """Token weights "divergence": of each step only the first token that its partner does not have counts.

    Two steps after the same tokens are then compared by two logits of one position: what follows a wrong turn is no
    longer pushed down with it. Pass the result to `StepLayout.from_step_ids(labels, step_ids, token_weights=...)`.

    ValueError for pairs of which one step is the beginning of the other, and for a step in two pairs that differ in
    different places: give each pair steps of its own.

    Example::

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
