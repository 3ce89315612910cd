# SPDX-License-Identifier: Apache-2.0
"""Writes docs/losses.md, the page of every loss, from the catalogue.

    python -m tools.write_losses_page [--check]

`--check` writes nothing and fails if the page is stale. The parity column comes from docs/parity.json, which
`pytest tests/losses -k parity` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sspo_ext.losses.catalogue import catalogue
from sspo_ext.losses.recipes import ABSENT
from tools.markdown import row

ROOT = Path(__file__).resolve().parents[1]

PAGE = ROOT / "docs" / "losses.md"

PARITY = ROOT / "docs" / "parity.json"

_INTRO = """\
# Losses

<!-- Written by `python -m tools.write_losses_page` from the definitions; do not edit. -->

Notation, for a step or, with one step a sequence, for a whole response:

* S is the summed log-probability of its scored tokens, weighted if the layout has token weights.
* R is the reference's sum, u = S - R, and n is the number of scored tokens.
* w and l are winner and loser.
* q is the probability that the winner is better: 1 - label_smoothing, or a soft label.
* sig is the logistic function, ls = log sig, and sg is stop-gradient.

An option that a loss does not have raises.
`sspo_ext.losses.catalogue()` gives the same table to a program.

The parity column names independent implementations, with the largest absolute differences of the loss and of its
gradient that `pytest tests/losses -k parity` found, both rounded up to a power of ten.
They are in float64, or in float32 where the peer has no float64; float32 differences grow with the loss and gradient.
Where the column is empty, golden values worked out by hand and float64 gradient checks are the only tests.
"""

_SECTIONS = {
    "pair": (
        "Pair losses",
        "Call `step_pref_loss(logits, layout, pairs, loss_type=...)`, `linear_step_pref_loss(hidden, weight, ...)`, or "
        "`losses.pref_loss(logps, ...)` with log-probs that exist already.\n"
        "They are fused on every backend: C++, CUDA and Triton are generated from one definition in "
        "`sspo_ext/formulas/`.\n"
        'A list, `loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]`, is a mixture over one pass of the logits.\n'
        "Each loss of a mixture takes the options, reference and labels that it has.",
    ),
    "function": (
        "Losses of step log-probs",
        "These are functions of `logps = step_logps(logits, layout)` or `linear_step_logps(hidden, weight, layout)`: "
        "torch ops on (S,) sums or (N,) tokens, which are tiny beside the logits.\n"
        "State of the whole batch is an argument, never hidden.",
    ),
    "policy": (
        "Policy losses",
        "`step_policy_loss(logits, layout, advantages, loss_type=...)` and `linear_step_policy_loss`.",
    ),
    "recipe": ("Methods that are settings of the above", ""),
}  # fmt: skip

_WHOLE = {
    "mixtures": 'Mixtures (`["sft", "bco_pair", "robust"]`), logits and linear route',
    "end to end": "A tiny Llama in float64: TRL's head and loss beside the linear route, gradients of every parameter",
}


def page() -> str:
    """The text of docs/losses.md."""
    parity = json.loads(PARITY.read_text()) if PARITY.exists() else {}
    parts = [_INTRO]
    for kind, (title, text) in _SECTIONS.items():
        chosen = [e for e in catalogue() if e.kind == kind]
        parts.append(f"\n## {title}\n" + (f"\n{text}\n" if text else ""))
        if kind == "recipe":
            parts.append("\n| method | how | needs | source | parity |\n| --- | --- | --- | --- | --- |\n")
            parts += [row(f"**{e.name}**", e.call, e.needs, e.source, _parity(parity.get(e.name, []))) for e in chosen]
            continue
        parts.append(
            "\n| name | formula | options | needs | use it where | source | parity |\n"
            "| --- | --- | --- | --- | --- | --- | --- |\n"
        )
        for e in chosen:
            options = ", ".join(f"{k} = {'none' if v is None else f'{v:g}'}" for k, v in e.options.items())
            name = f"`{e.name}`" if kind != "function" else f"`{e.call.split('(')[0]}`"
            parts.append(row(name, e.formula, options, e.needs, e.use, e.source, _parity(parity.get(e.name, []))))
    parts += [f"\n{text}: {_parity(parity[key])}.\n" for key, text in _WHOLE.items() if key in parity]
    parts.append("\n## Not here\n\n| method | why |\n| --- | --- |\n")
    parts += [row(f"**{name}**", why) for name, why in ABSENT]
    return "".join(parts)


def _parity(measured: list[dict]) -> str:
    found: dict[str, list[str]] = {}
    for m in measured:
        found.setdefault(f"{m['peer']}: {m['loss']:.0e}, {m['gradient']:.0e}", []).append(m.get("note", ""))
    return "; ".join(text + (f" ({'; '.join(notes)})" if any(notes) else "") for text, notes in found.items())


def main(argv: list[str] | None = None) -> int:
    """The command; 1 for a stale page with --check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
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
