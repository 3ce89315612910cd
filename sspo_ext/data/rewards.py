# SPDX-License-Identifier: Apache-2.0
"""Several reward functions, as one grader of many columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._checks import describe
from .graders import Grader, grade_rows


class RewardFunctions:
    """Grades completions by one reward function or several.

    The first function says whether an answer is right. Accuracy, values and step advantages are about its rewards.

    Args:
        functions: A grader, or several, of either form (`sspo_ext.data.graders`).
        weights: A number for each function; None means 1 each.

    Raises:
        TypeError: For a function that cannot be called.
        ValueError: For no function, or weights that do not fit.

    Examples:
        >>> from sspo_ext.data.rewards import RewardFunctions
        >>> def right(prompt, completion, answer):
        ...     return float(completion == answer)
        >>> def brief(prompts, completions, **columns):
        ...     return [None if p == "long" else -len(c) for p, c in zip(prompts, completions)]
        >>> rewards = RewardFunctions([right, brief], [1.0, 0.1])
        >>> rewards([{"prompt": "6 + 7 = ", "answer": "13"}], ["13"])
        [[1.0, -2.0]]
    """

    def __init__(self, functions: Grader | Sequence[Grader], weights: Sequence[float] | None = None):
        self.functions = list(functions) if isinstance(functions, Sequence) else [functions]
        if not self.functions:
            raise ValueError("reward_func: expected a function, or several, got none")
        for function in self.functions:
            if not callable(function):
                raise TypeError(f"reward_func: expected a function, or a list of them, got {describe(function)}")
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights: expected one for each of {len(self.functions)} reward functions, got {weights}"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"reward_weights: expected finite numbers, got {weights}")
        self.names = _distinct([_name(function) for function in self.functions])

    def total(self, rewards: Sequence[float]) -> float:
        """The weighted sum of one completion's rewards, of the functions that apply."""
        return sum(w * r for w, r in zip(self.weights, rewards, strict=True) if not math.isnan(r))

    def __call__(
        self, rows: Sequence[Mapping], completions: Sequence[str], *, unit: bool = False, **more: Any
    ) -> list[list[float]]:
        """Rewards of completions.

        Args:
            rows: See `grade_rows`.
            completions: A text for each row.
            unit: Whether the first function's rewards must be in [0, 1].
            **more: Extra arguments for graders of TRL's form.

        Returns:
            For each row a number of each function; NaN where a function of several returned None, "does not apply".

        Raises:
            ValueError: See `grade_rows`; and if no function applies to a row, or, with `unit`, the first one does not.
            TypeError: See `grade_rows`.
        """
        options: dict[str, Any] = {"missing": math.nan, **more} if len(self.functions) > 1 else more
        columns = [
            grade_rows(function, rows, completions, unit=unit and not place, **options)
            for place, function in enumerate(self.functions)
        ]
        found = [list(row) for row in zip(*columns, strict=True)]
        for row, text in zip(found, completions, strict=True):
            if unit and math.isnan(row[0]):
                raise ValueError(
                    f"reward_func: expected a reward of {self.names[0]}, the first function, for every completion, "
                    f"since the values are about it, got None for {text!r}"
                )
            if all(map(math.isnan, row)):
                raise ValueError(f"reward_func: expected a function that applies, got None from all for {text!r}")
        return found


def _name(function: Callable) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    return getattr(inner, "__name__", type(inner).__name__)


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number where one is there already."""
    found: list[str] = []
    for name in names:
        number, new = 2, name
        while new in found:
            new, number = f"{name}_{number}", number + 1
        found.append(new)
    return found
