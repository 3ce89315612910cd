# SPDX-License-Identifier: Apache-2.0
"""Every loss of this package in one table: the source of docs/losses.md."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..formulas.policy import POLICY_FORMULAS, PolicyFormula
from ..formulas.registry import PAIR_FORMULAS, PairFormula
from . import lists, targets, tokens, transport, unpaired
from .common import LOSS_FUNCTIONS, LossFunction
from .recipes import RECIPES

_MODULES = (unpaired, transport, lists, targets, tokens)  # they fill LOSS_FUNCTIONS; the page has this order


@dataclass(frozen=True)
class Entry:
    """One loss of the table. Formula and use are empty for a recipe."""

    name: str
    kind: str  # "pair", "function", "policy" or "recipe"
    call: str
    formula: str
    source: str
    use: str
    needs: str
    options: Mapping[str, float | None] = field(default_factory=dict)  # option -> default


def catalogue() -> list[Entry]:
    """Every loss of this package: pair formulas, functions of step log-probs, policy formulas, then recipes.

    Returns:
        A list of Entry.

    Examples:
        >>> names = [entry.name for entry in catalogue() if entry.kind == "pair"]
    """
    return [
        *(_of_pair_formula(definition) for definition in PAIR_FORMULAS.values()),
        *(_of_function(f) for m in _MODULES for f in LOSS_FUNCTIONS.values() if f.fn.__module__ == m.__name__),
        *(_of_policy_formula(definition) for definition in POLICY_FORMULAS.values()),
        *(Entry(name, "recipe", how, "", source, "", needs) for name, how, source, needs in RECIPES),
    ]


def _of_pair_formula(f: PairFormula) -> Entry:
    needs = {"optional": "pairs", "required": "pairs, reference", "forbidden": "pairs, no reference"}[f.reference]
    takes = [
        *(["label_smoothing"] if f.smoothing == "optional" else []),
        *(["soft_labels"] if f.soft_labels else []),
        *(["margins"] if f.margins else []),
    ]
    needs += ", label_smoothing" if f.smoothing == "required" else ""
    needs += f"; takes {', '.join(takes)}" if takes else ""
    call = f'step_pref_loss(..., loss_type="{f.name}")'
    return Entry(f.name, "pair", call, f.formula, f.source, f.use, needs, dict(f.options))


def _of_policy_formula(f: PolicyFormula) -> Entry:
    needs = "advantages" + (", old log-probs" if f.has_ratio else "")
    call = f'step_policy_loss(..., loss_type="{f.name}")'
    return Entry(f.name, "policy", call, f.formula, f.source, f.use, needs, dict(f.options))


def _of_function(f: LossFunction) -> Entry:
    parameters = inspect.signature(f.fn).parameters.values()
    options = {p.name: p.default for p in parameters if type(p.default) is float}
    needs = f.needs + f"; mean over {f.unit}s" if f.unit != "pair of sequences" else f.needs + "; mean over pairs"
    call = f"losses.{f.fn.__name__}(logps, layout, ...)"
    return Entry(f.name, "function", call, f.formula, f.source, f.use, needs, options)
