"""Every loss of this package in one table: the source of docs/losses.md."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

from ..formulas.policy import POLICY_HEADS
from ..formulas.registry import PAIR_HEADS, PairHead
from . import lists, targets, tokens, transport, unpaired  # noqa: F401, I001 (they fill LOSS_FUNCTIONS, in this order)
from .common import LOSS_FUNCTIONS, LossFunction
from .recipes import RECIPES


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
        *(_of_head(head) for head in PAIR_HEADS.values()),
        *(_of_function(function) for function in LOSS_FUNCTIONS.values()),
        *(
            Entry(
                head.name, "policy", f'step_policy_loss(..., loss_type="{head.name}")', head.formula, head.source,
                head.use, "advantages" + (", old log-probs" if head.has_ratio else ""), dict(head.options),
            )
            for head in POLICY_HEADS.values()
        ),
        *(Entry(name, "recipe", how, "", source, "", needs) for name, how, source, needs in RECIPES),
    ]  # fmt: skip


def _of_head(head: PairHead) -> Entry:
    needs = {"optional": "pairs", "required": "pairs, reference", "forbidden": "pairs, no reference"}[head.reference]
    takes = [
        *(["label_smoothing"] if head.smoothing == "optional" else []),
        *(["soft_labels"] if head.soft_labels else []),
        *(["margins"] if head.margins else []),
    ]
    needs += ", label_smoothing" if head.smoothing == "required" else ""
    needs += f"; takes {', '.join(takes)}" if takes else ""
    call = f'step_pref_loss(..., loss_type="{head.name}")'
    return Entry(head.name, "pair", call, head.formula, head.source, head.use, needs, dict(head.options))


def _of_function(f: LossFunction) -> Entry:
    parameters = inspect.signature(f.fn).parameters.values()
    options = {p.name: p.default for p in parameters if type(p.default) is float}
    needs = f.needs + f"; mean over {f.unit}s" if f.unit != "pair of sequences" else f.needs + "; mean over pairs"
    call = f"{f.fn.__module__.removeprefix('sspo_ext.')}.{f.fn.__name__}(logps, layout, ...)"
    return Entry(f.name, "function", call, f.formula, f.source, f.use, needs, options)
