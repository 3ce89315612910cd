# SPDX-License-Identifier: Apache-2.0
"""Forced answers: how often a model is right if its answer is demanded early."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..._checks import check_choice, check_count, check_kind
from ..values import StepBatch
from .probe import probe_step_values
from .texts import Probe, as_probe

BY = ("steps", "tokens")

_POINTS = 16  # budgets above 0 that are tried by default


@dataclass(frozen=True)
class BudgetCurve:
    """Accuracy against the budget at which the answer is demanded.

    Attributes:
        by: "steps" or "tokens".
        budgets: n whole numbers, ascending.
        accuracy: n numbers: the mean grade.
        spent: n numbers: the mean tokens of the completions up to there; a completion that has ended spends no more.
    """

    by: str
    budgets: tuple[int, ...]
    accuracy: tuple[float, ...]
    spent: tuple[float, ...]

    @property
    def area(self) -> float:
        """The area under the curve over its width: the mean accuracy, if every budget is as likely as another."""
        return _area(self.budgets, self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """The same in types of JSON, with the area."""
        lists = {name: list(getattr(self, name)) for name in ("budgets", "accuracy", "spent")}
        return {"by": self.by, **lists, "area": self.area}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> BudgetCurve:
        """What `to_dict` wrote."""
        lists = {name: tuple(found[name]) for name in ("budgets", "accuracy", "spent")}
        return cls(found["by"], **lists)


def budget_curve(
    model: nn.Module,
    tokenizer,
    batch: StepBatch,
    answers: Sequence[Any],
    probe: str | Probe,
    grader: Callable[[str, Any], float],
    *,
    by: str = "tokens",
    budgets: Sequence[int] | None = None,
    rewards: Sequence[float | None] | None = None,
    max_answer_tokens: int = 16,
    engine: str = "auto",
    max_tokens: int = 4096,
) -> BudgetCurve:
    """Measure how often a model is right if its answer is demanded after k steps or n tokens of its completion.

    Each completion is cut at the budget, the probe is appended, and the model answers greedily. A model that thinks
    more than it needs is right long before its completions end. So a model before and after training is compared by
    its whole curve, and not at the length that it happens to have.

    Args:
        model: any Hugging Face causal LM, usually the one that wrote the completions.
        tokenizer: its tokenizer.
        batch: B prompts and their completions in steps.
        answers: B answers, as `grader` takes them.
        probe: what demands the answer.
        grader: grader(the answer's text, answer) -> a number in [0, 1], as `sspo_ext.data.graders.answer_grader` makes.
        by: "steps" or "tokens".
        budgets: whole numbers from 0. None: 17 from 0 to the longest completion, or every step if there are fewer.
            Curves that are to be compared need the same budgets.
        rewards: B numbers, or None for a completion that did not end by itself. From its end on a completion counts by
            its own reward, since nothing has to be demanded. None: the answer is demanded after the end too.
        max_answer_tokens: the largest number of tokens of an answer.
        engine: "auto", "cached" or "separate".
        max_tokens: the budget of one forward in tokens.

    Returns:
        BudgetCurve.

    Raises:
        ValueError: if an argument does not fit.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> batch = StepBatch([[5, 6]], [[[7], [8, 9]]])
        >>> curve = budget_curve(model, tokenizer, batch, ["26"], "####", lambda text, answer: text == answer)
        >>> curve.budgets, curve.spent
        ((0, 1, 2, 3), (0.0, 1.0, 2.0, 3.0))
    """
    check_kind("batch", batch, StepBatch, "a StepBatch")
    check_choice("by", by, BY)
    if not len(batch):
        raise ValueError("batch: expected at least one sequence, got none")
    for name, given in (("answers", answers), ("rewards", rewards)):
        if given is not None and len(given) != len(batch):
            raise ValueError(f"{name}: expected one for each of {len(batch)} sequences, got {len(given)}")
    sizes = [_sizes(batch, b, by) for b in range(len(batch))]
    wanted = _budgets(budgets, max(len(size) - 1 for size in sizes))
    own: list[float | None] = list(rewards) if rewards is not None else [None] * len(batch)
    # the tokens of each completion at each budget; one that has ended stays at its end
    cuts = [[size[min(budget, len(size) - 1)] for budget in wanted] for size in sizes]
    asked = [sorted({cut for cut in row if own[b] is None or cut < sizes[b][-1]}) for b, row in enumerate(cuts)]
    grades = _forced(
        model, tokenizer, batch, asked, answers, as_probe(probe), mode="graded", temperature=0.0, grader=grader,
        max_answer_tokens=max_answer_tokens, engine=engine, max_tokens=max_tokens,
    )  # fmt: skip
    accuracy, spent = [], []
    for i in range(len(wanted)):
        at = [row[i] for row in cuts]
        found = [grades[b][cut] if cut in grades[b] else own[b] for b, cut in enumerate(at)]
        accuracy.append(math.fsum(x for x in found if x is not None) / len(at))
        spent.append(sum(at) / len(at))
    return BudgetCurve(by, tuple(wanted), tuple(accuracy), tuple(spent))


def efficiency_gaps(curves: Mapping[str, BudgetCurve]) -> dict[str, float]:
    """Return each curve's gap to the frontier, which is the best of all curves at every budget.

    The reasoning efficiency gap (REG, arXiv 2506.07104) sums, over all token budgets, the accuracy that a model lacks
    to the best of a pool of models. Ours divides by the largest budget, so that it is in [0, 1], takes the trapezoidal
    rule between the budgets tried, and demands the answer where a completion is cut. The pool is what you give: another
    pool has another frontier.

    Args:
        curves: at least two, by the same budgets.

    Returns:
        For each name a number of at least 0; 0 for a curve that is the best everywhere.

    Raises:
        ValueError: if there is only one curve, or the budgets differ.

    Examples:
        >>> before = BudgetCurve("tokens", (0, 10, 20), (0.0, 0.5, 1.0), (0.0, 10.0, 20.0))
        >>> after = BudgetCurve("tokens", (0, 10, 20), (0.0, 1.0, 1.0), (0.0, 10.0, 10.0))
        >>> efficiency_gaps({"before": before, "after": after})
        {'before': 0.25, 'after': 0.0}
    """
    many = list(curves.values())
    if len(many) < 2 or any((c.by, c.budgets) != (many[0].by, many[0].budgets) for c in many):
        raise ValueError("curves: expected at least two with the same budgets; give budgets= to budget_curve")
    frontier = [max(points) for points in zip(*(c.accuracy for c in many), strict=True)]
    best = _area(many[0].budgets, frontier)
    return {name: best - curve.area for name, curve in curves.items()}


def _sizes(batch: StepBatch, b: int, by: str) -> list[int]:
    """The tokens of a completion after 0, 1, 2, ... steps or tokens, up to its end."""
    first, *later = batch.boundaries(b)
    ends = [0, *(end - first for end in later)]
    return ends if by == "steps" else list(range(ends[-1] + 1))


def _budgets(given: Sequence[int] | None, longest: int) -> list[int]:
    if given is None:
        return sorted({round(longest * i / _POINTS) for i in range(_POINTS + 1)})
    for budget in given:
        check_count("budgets", budget, 0)
    if not len(given) or list(given) != sorted(set(given)):
        raise ValueError(f"budgets: expected whole numbers, ascending, got {list(given)}")
    return list(given)


def _forced(
    model: nn.Module, tokenizer, batch: StepBatch, asked: list[list[int]], answers: Sequence[Any], probe: Probe, **how
) -> list[dict[int, float]]:
    """The grade of the answer that is demanded after so many tokens of a completion, for all that are asked."""
    which = [b for b, cuts in enumerate(asked) if cuts]
    prompts, pieces, skipped = [], [], []
    for b in which:
        tokens = batch.sequence(b)[len(batch.prompt_ids[b]) :]
        cuts = asked[b]
        edges = [0, *(cut for cut in cuts if cut)]
        prompts.append(batch.prompt_ids[b])
        pieces.append([tokens[i:j] for i, j in zip(edges, edges[1:], strict=False)])
        skipped.append(cuts[0] != 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="graded probe: the grader gave 0")  # here it is a result
        values = probe_step_values(
            model, StepBatch(prompts, pieces), probe, [answers[b] for b in which], tokenizer=tokenizer, **how
        ).to_lists()
    grades: list[dict[int, float]] = [{} for _ in asked]
    for b, found, skip in zip(which, values, skipped, strict=True):
        grades[b] = dict(zip(asked[b], found[skip:], strict=True))
    return grades


def _area(budgets: Sequence[int], accuracy: Sequence[float]) -> float:
    width = budgets[-1] - budgets[0]
    if not width:
        return accuracy[-1]
    parts = zip(budgets, budgets[1:], accuracy, accuracy[1:], strict=False)
    return math.fsum((j - i) * (a + b) / 2 for i, j, a, b in parts) / width
