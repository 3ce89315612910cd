"""Every loss of this package in one table: the source of docs/losses.md."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

from ..formulas.policy import POLICY_FORMULAS
from ..formulas.registry import PAIR_FORMULAS, PairFormula
from . import lists, targets, tokens, transport, unpaired
from .common import LOSS_FUNCTIONS, LossFunction
from .recipes import RECIPES

_MODULES = (unpaired, transport, lists, targets, tokens)  # they fill LOSS_FUNCTIONS; the page has this order


@dataclass(frozen=True)
class Entry:
    """One loss."""

    name: str
    kind: str  # "pair", "function", "policy" or "recipe"
    call: str
    formula: str
    source: str
    use: str
    needs: str
    options: dict[str, float | None] = field(default_factory=dict)


def catalogue() -> list[Entry]:
    """Every loss of this package: pair formulas, functions of step log-probs, policy formulas, recipes, in this order."""
    return [
        *(_of_formula(definition) for definition in PAIR_FORMULAS.values()),
        *(_of_function(f) for m in _MODULES for f in LOSS_FUNCTIONS.values() if f.fn.__module__ == m.__name__),
        *(
            Entry(
                definition.name, "policy", f'step_policy_loss(..., loss_type="{definition.name}")', definition.formula, definition.source,
                definition.use, "advantages" + (", old log-probs" if definition.has_ratio else ""), dict(definition.options),
            )
            for definition in POLICY_FORMULAS.values()
        ),
        *(Entry(name, "recipe", how, "", source, "", needs) for name, how, source, needs in RECIPES),
    ]  # fmt: skip


def _of_formula(definition: PairFormula) -> Entry:
    needs = {"optional": "pairs", "required": "pairs, reference", "forbidden": "pairs, no reference"}[
        definition.reference
    ]
    takes = [
        *(["label_smoothing"] if definition.smoothing == "optional" else []),
        *(["soft_labels"] if definition.soft_labels else []),
        *(["margins"] if definition.margins else []),
    ]
    needs += ", label_smoothing" if definition.smoothing == "required" else ""
    needs += f"; takes {', '.join(takes)}" if takes else ""
    call = f'step_pref_loss(..., loss_type="{definition.name}")'
    return Entry(
        definition.name,
        "pair",
        call,
        definition.formula,
        definition.source,
        definition.use,
        needs,
        dict(definition.options),
    )


def _of_function(f: LossFunction) -> Entry:
    parameters = inspect.signature(f.fn).parameters.values()
    options = {p.name: p.default for p in parameters if type(p.default) is float}
    needs = f.needs + f"; mean over {f.unit}s" if f.unit != "pair of sequences" else f.needs + "; mean over pairs"
    call = f"{f.fn.__module__.removeprefix('sspo_ext.')}.{f.fn.__name__}(logps, layout, ...)"
    return Entry(f.name, "function", call, f.formula, f.source, f.use, needs, options)
