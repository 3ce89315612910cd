# SPDX-License-Identifier: Apache-2.0
"""What the demo says of its numbers: the table, and one sentence with its intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MARGIN = 0.02  # "as often right" means: not more than this below, with 95 % confidence

STAGES = {"start": "start model", "outcome": "outcome only (RLOO)", "sspo": "SSPO"}


@dataclass(frozen=True)
class Claim:
    """SSPO beside outcome-only training on the same problems: means, and half widths of their 95 % intervals.

    Attributes:
        shorter: The share of tokens that SSPO saves.
        right: Its share of right answers less that of the other.
    """

    shorter: tuple[float, float]
    right: tuple[float, float]

    def sentence(self, where: str) -> str:
        """The finding in one sentence. Its words are chosen by the ends of the intervals.

        Args:
            where: What was measured, such as "this run"; it follows "of".
        """
        (saved, saved_error), (gain, gain_error) = self.shorter, self.right
        length = "shorter" if saved > saved_error else "not shown to be shorter"
        if saved - saved_error >= 1 / 3:
            length = "at least a third shorter"
        accuracy = "but not shown to be as often right"
        if gain - gain_error > 0:
            accuracy = "and more often right"
        elif gain - gain_error >= -MARGIN:
            accuracy = "and as often right"
        elif gain + gain_error < 0:
            accuracy = "but less often right"
        return (
            f"SSPO's solutions of {where} are {length} than those of outcome-only training {accuracy}: "
            f"{100 * saved:.1f} ± {100 * saved_error:.1f} % fewer tokens, "
            f"{100 * gain:+.1f} ± {100 * gain_error:.1f} points of right answers"
        )


def of_problems(ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]) -> Claim:
    """The claim of one run, compared problem by problem.

    Args:
        ours: What `measure` found with SSPO.
        theirs: What it found with outcome-only training, on the same problems.

    Returns:
        The claim; its errors are 1.96 standard errors over the problems.
    """
    gaps = [a - b for a, b in zip(ours["correct"], theirs["correct"], strict=True)]
    ratio = sum(ours["tokens"]) / sum(theirs["tokens"])
    # The error of a ratio of means, to first order.
    rest = [a - ratio * b for a, b in zip(ours["tokens"], theirs["tokens"], strict=True)]
    mean = sum(theirs["tokens"]) / len(rest)
    return Claim((1 - ratio, 1.96 * standard_error(rest) / mean), (sum(gaps) / len(gaps), 1.96 * standard_error(gaps)))


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) / len(values))


def table(stages: Mapping[str, Mapping]) -> str:
    """The table of the held-out problems in markdown, one column for each stage."""

    def row(name: str, how: str, key: str, form: str) -> str:
        return f"| {name} | " + " | ".join(form.format(stage[how][key]) for stage in stages.values()) + " |"

    return "\n".join(
        [
            "| held-out problems | " + " | ".join(STAGES[name] for name in stages) + " |",
            "| --- |" + " --- |" * len(stages),
            row("right answers, greedy", "greedy", "accuracy", "{:.1%}"),
            row("tokens, greedy", "greedy", "tokens", "{:.1f}"),
            row("steps, greedy", "greedy", "steps", "{:.2f}"),
            row("right answers, sampled", "sampled", "accuracy", "{:.1%}"),
            row("tokens, sampled", "sampled", "tokens", "{:.1f}"),
            row("needed steps skipped, sampled", "sampled", "skipped", "{:.2f}"),
        ]
    )
