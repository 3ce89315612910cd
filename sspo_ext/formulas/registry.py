# SPDX-License-Identifier: Apache-2.0
"""What a pair loss is: scores of a pair in, its loss out, and beside it a declaration of what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from .._checks import check_choice, check_number, check_positive
from .other_names import check_loss_name


class PairScores(NamedTuple):
    """What a pair formula sees of P pairs; every field broadcasts against (P,)."""

    u_w: Tensor  # winner's S - S_ref (S alone without a reference)
    u_l: Tensor  # loser's
    n_w: Tensor  # winner's scored tokens, at least 1
    n_l: Tensor
    margin: Tensor  # in units of the reward beta * u
    label: Tensor  # probability that the winner is the better step: 1 - label_smoothing, or a soft label


@dataclass(frozen=True)
class Limit:
    """What an option's value must satisfy beyond being finite."""

    holds: Callable[[float], bool]
    text: str


@dataclass(frozen=True)
class PairFormula:
    """A pair loss: its definition, and what it takes."""

    name: str
    fn: Callable[..., Tensor]  # (PairScores, **options) -> (P,)
    options: Mapping[str, float]  # option -> default, in the order kernels take them; beta first
    formula: str
    source: str
    use: str  # where it is the right choice
    reference: Literal["optional", "forbidden", "required"] = "optional"
    smoothing: Literal["none", "optional", "required"] = "none"  # label_smoothing
    soft_labels: bool = False
    margins: bool = True
    per_token_reward: bool = False  # rewards in the metrics are beta * u / n
    by_winner_tokens: bool = False  # a pair's weight is its winner's tokens, so that the mean is one over tokens
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def check_options(self, beta: float, given: Mapping[str, float]) -> list[float]:
        """Option values in kernel order; TypeError for an option that this loss does not have."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            has = ", ".join(self.options)
            raise TypeError(
                f"{unknown[0]}: neither a common option nor one of loss_type {self.name!r} (which has {has})"
            )
        values = {name: given.get(name, default) for name, default in {**self.options, "beta": beta}.items()}
        for name, value in values.items():
            check_number(name, value)
            if name in self.limits and not self.limits[name].holds(value):
                raise ValueError(f"{name}: loss_type {self.name!r} expects {self.limits[name].text}, got {value!r}")
        check_positive("beta", beta)
        return [float(v) for v in values.values()]


PAIR_FORMULAS: dict[str, PairFormula] = {}
MAX_OPTIONS = 4
ABOVE_ZERO = Limit(lambda v: v > 0, "a number above 0")
NOT_NEGATIVE = Limit(lambda v: v >= 0, "0 or a number above")


def pair_formula(name: str, *, options: Mapping[str, float], **facts):
    """Registers the decorated definition; `facts` are further fields of PairFormula."""

    def register(fn):
        assert next(iter(options)) == "beta" and len(options) <= MAX_OPTIONS and name not in PAIR_FORMULAS
        PAIR_FORMULAS[name] = PairFormula(name, fn, options, **facts)
        return fn

    return register


def formula_id(name: str) -> int:
    """The number kernels know a formula by: its place in PAIR_FORMULAS."""
    return list(PAIR_FORMULAS).index(name)


# TRL's names of losses that need more than two scores a pair, and the function that computes each here
_ELSEWHERE = {
    "aot": "aot_loss",
    "aot_unpaired": "aot_unpaired_loss",
    "kto": "kto_loss",
    "apo_zero_unpaired": "apo_zero_unpaired_loss",
}


def get_pair_formula(name: str) -> PairFormula:
    """The formula of this name; ValueError for an unknown one."""
    if isinstance(name, str) and name in _ELSEWHERE:
        raise ValueError(
            f"loss_type: {name!r} needs more than a pair at a time; call "
            f"sspo_ext.losses.{_ELSEWHERE[name]}(step_logps(...), ...)"
        )
    check_loss_name(name, PAIR_FORMULAS, policy=False)
    check_choice("loss_type", name, tuple(PAIR_FORMULAS))
    return PAIR_FORMULAS[name]
