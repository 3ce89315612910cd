# SPDX-License-Identifier: Apache-2.0
"""The options of `probe_step_values`, which can be checked without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..._checks import check_choice, check_count, check_not_negative, check_number
from ..branches.branch import ALL_ENGINES, SAMPLING_ENGINES

NEAR_ZERO = 1e-3  # a value below this says that the model does not answer rightly here

FLOOR = -10.0  # log-probabilities below this are taken for it

REDUCE = ("joint", "mean", "logprob")

# The options that have an effect in one mode only.
_OWN = {"likelihood": ("reduce", "floor"), "graded": ("grader", "num_samples", "max_answer_tokens", "temperature")}


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """The options of `probe_step_values`, which documents them.

    Making one raises ValueError or TypeError for a value that does not fit, and for an option that was given but has no
    effect in the mode.
    """

    mode: str = "likelihood"
    reduce: str = "joint"
    floor: float = FLOOR
    engine: str = "auto"
    max_tokens: int = 4096
    grader: Callable[[str, Any], float] | None = None
    num_samples: int = 5
    max_answer_tokens: int = 10
    temperature: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, tuple(_OWN))
        check_choice("reduce", self.reduce, REDUCE)
        check_floor(self.floor)
        check_choice("engine", self.engine, ("auto", *(ALL_ENGINES if self.mode == "likelihood" else SAMPLING_ENGINES)))
        check_count("max_tokens", self.max_tokens)
        check_count("seed", self.seed, 0)
        check_count("num_samples", self.num_samples)
        check_count("max_answer_tokens", self.max_answer_tokens)
        check_not_negative("temperature", self.temperature)
        default = {field.name: field.default for field in fields(self)}
        for name in (name for mode, names in _OWN.items() if mode != self.mode for name in names):
            if getattr(self, name) != default[name]:
                raise ValueError(f"{name}: has no effect with mode {self.mode!r}; leave it out, or use the other mode")
        if self.floor != FLOOR and self.reduce != "logprob":
            raise ValueError(f"floor: has no effect with reduce {self.reduce!r}; leave it out, or use 'logprob'")


def check_floor(value: object) -> None:
    """TypeError or ValueError unless `value` is a finite number below 0."""
    check_number("floor", value)
    if value >= 0:  # pyright: ignore[reportOperatorIssue]  # it is a number
        raise ValueError(f"floor: expected a number below 0, got {value!r}")
