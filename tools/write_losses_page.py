"""Writes docs/losses.md, the page of every loss, from the catalogue.

    python -m tools.write_losses_page [--check]

`--check` writes nothing and fails if the page is stale. The parity column comes from docs/parity.json, which
tests/losses/test_parity_losses.py and tests/losses/test_parity_policy.py measure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sspo_ext.losses.catalogue import catalogue
from sspo_ext.losses.recipes import ABSENT

ROOT = Path(__file__).resolve().parents[1]

PAGE = ROOT / "docs" / "losses.md"

PARITY = ROOT / "docs" / "parity.json"

_INTRO = """\
# Losses

<!-- Written by `python -m tools.write_losses_page` from the definitions; do not edit. -->

Notation, for a step or, with one step a sequence, a whole response: S the summed log-probability of its scored tokens
(weighted, where the layout has token weights), R the reference's, u = S - R, n the number of scored tokens, w and l
winner and loser, sig the logistic function, ls = log sig, q the probability that the winner is better (1 -
label_smoothing, or a soft label), sg stop-gradient. An option that a loss does not have raises.
`sspo_ext.losses.catalogue()` gives the same table to a program.

The parity column names independent implementations and the largest absolute differences of the loss and of its gradient
found by `pytest tests/losses -k parity` in float64 (where the peer has no float64, in float32, whose differences grow
with the size of the loss and of the gradient), both rounded up to a power of ten. Where it is empty, the golden values
worked out by hand and the float64 gradient checks stand alone.
"""

_SECTIONS = {
    "pair": (
        "Pair losses",
        "`step_pref_loss(logits, layout, pairs, loss_type=...)`, `linear_step_pref_loss(hidden, weight, ...)`, or "
        "`losses.pref_loss(logps, ...)` of log-probs that are there already. Fused on every backend: one definition in "
        "`sspo_ext/heads/`, from which C++, CUDA and Triton are generated. A list, `loss_type=[\"sigmoid\", \"sft\"], "
        "loss_weights=[1.0, 0.2]`, is a mixture over one pass of the logits, in which each loss takes the options, "
        "reference and labels that it has.",
    ),
    "function": (
        "Losses of step log-probs",
        "Functions of `logps = step_logps(logits, layout)` or `linear_step_logps(hidden, weight, layout)`: torch ops "
        "on (S,) sums or (N,) tokens, tiny beside the vocabulary. State of the whole batch is passed in, never hidden.",
    ),
    "policy": (
        "Policy losses",
        "`step_policy_loss(logits, layout, advantages, loss_type=...)` and `linear_step_policy_loss`.",
    ),
    "recipe": ("Methods that are settings of the above", ""),
}  # fmt: skip

_WHOLE = {
    "mixtures": 'Mixtures (`["sft", "bco_pair", "robust"]`), logits and linear route',
    "end to end": "A tiny Llama in float64, TRL's head and loss against the linear route, gradients of every parameter",
}


def page() -> str:
    parity = json.loads(PARITY.read_text()) if PARITY.exists() else {}
    parts = [_INTRO]
    for kind, (title, text) in _SECTIONS.items():
        chosen = [e for e in catalogue() if e.kind == kind]
        parts.append(f"\n## {title}\n" + (f"\n{text}\n" if text else ""))
        if kind == "recipe":
            parts.append("\n| method | how | needs | source | parity |\n| --- | --- | --- | --- | --- |\n")
            parts += [_row(f"**{e.name}**", e.call, e.needs, e.source, _parity(parity.get(e.name, []))) for e in chosen]
            continue
        parts.append(
            "\n| name | formula | options | needs | use it where | source | parity |\n"
            "| --- | --- | --- | --- | --- | --- | --- |\n"
        )
        for e in chosen:
            options = ", ".join(f"{k} = {'none' if v is None else f'{v:g}'}" for k, v in e.options.items())
            name = f"`{e.name}`" if kind != "function" else f"`{e.call.split('(')[0]}`"
            parts.append(_row(name, e.formula, options, e.needs, e.use, e.source, _parity(parity.get(e.name, []))))
    parts += [f"\n{text}: {_parity(parity[key])}.\n" for key, text in _WHOLE.items() if key in parity]
    parts.append("\n## Not here\n\n| method | why |\n| --- | --- |\n")
    parts += [_row(f"**{name}**", why) for name, why in ABSENT]
    return "".join(parts)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _parity(measured: list[dict]) -> str:
    found: dict[str, list[str]] = {}
    for m in measured:
        found.setdefault(f"{m['peer']}: {m['loss']:.0e}, {m['gradient']:.0e}", []).append(m.get("note", ""))
    return "; ".join(text + (f" ({'; '.join(notes)})" if any(notes) else "") for text, notes in found.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/losses.md is stale")
    check = parser.parse_args(argv).check
    text = page()
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    if not check:
        PAGE.write_text(text)
    print(f"{'stale' if check else 'wrote'}: docs/losses.md")
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
