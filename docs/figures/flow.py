# SPDX-License-Identifier: Apache-2.0
"""Draws the figure of README and the landing page, for a light and a dark background.

    python docs/figures/flow.py [--check]

`--check` writes nothing and fails if a file is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 1000, 390
STEPS = ("#3b82f6", "#f59e0b", "#10b981")
THEMES = {
    "light": {"ink": "#1f2937", "soft": "#6b7280", "line": "#9ca3af", "idle": "#e5e7eb", "on_step": "#ffffff"},
    "dark": {"ink": "#f3f4f6", "soft": "#a1a8b3", "line": "#7b8494", "idle": "#3b4250", "on_step": "#ffffff"},
}
PROMPT, LENGTHS = 3, ((2, 3, 2), (2, 2, 3))  # tokens of the prompt, and of the steps of each response
PITCH, COLUMN, CELL = 20, 64, 14
ROWS = (("chosen", 104), ("rejected", 222))
LOGITS, LOGPS, SUMS, LOSS = 92, 370, 590, 826  # left edges


def figure(theme: dict[str, str]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif">',
        "<title>From logits to step sums to the loss of pairs of steps, and back</title>",
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{theme["line"]}"/></marker></defs>',
    ]

    def text(x, y, words, size=15, fill="ink", anchor="middle", weight="normal"):
        parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{theme.get(fill, fill)}">{words}</text>'
        )

    def box(x, y, width, height, fill, radius=3, stroke="none"):
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{theme.get(fill, fill)}" '
            f'stroke="{theme.get(stroke, stroke)}" stroke-width="1.5"/>'
        )

    def line(path, colour="line", tip=True, width=2):
        end = ' marker-end="url(#tip)"' if tip else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{theme.get(colour, colour)}" stroke-width="{width}"{end}/>')

    logits_end = LOGITS + 10 * PITCH - (PITCH - CELL)
    logps_end = LOGPS + 7 * PITCH - (PITCH - CELL)
    heads = ((LOGITS, logits_end, "logits"), (LOGPS, logps_end, "token log-probs"), (SUMS, SUMS + 132, "step sums"))
    for left, right, words in (*heads, (LOSS, LOSS + 128, "loss of pairs")):
        text((left + right) / 2, 30, words, 18, weight="600")
    text((LOGITS + logits_end) / 2, 50, "one column a token", 13, "soft")
    text((LOGPS + logps_end) / 2, 50, "scored tokens only", 13, "soft")
    text(SUMS + 66, 50, "one number a step", 13, "soft")
    text(LOSS + 64, 50, "winner against loser", 13, "soft")

    for (name, middle), lengths in zip(ROWS, LENGTHS, strict=True):
        text(LOGITS - 14, middle + 5, name, 15, anchor="end")
        for token in range(PROMPT):
            box(LOGITS + token * PITCH, middle - COLUMN / 2, CELL, COLUMN, "idle")
        token = 0
        for step, (length, colour) in enumerate(zip(lengths, STEPS, strict=True)):
            start = token
            for _ in range(length):
                box(LOGITS + (PROMPT + token) * PITCH, middle - COLUMN / 2, CELL, COLUMN, colour)
                box(LOGPS + token * PITCH, middle - CELL / 2, CELL, CELL, colour)
                token += 1
            left, right = LOGPS + start * PITCH, LOGPS + token * PITCH - (PITCH - CELL)
            line(f"M{left} {middle + 14}H{right}", colour, tip=False, width=3)
            box(SUMS + step * 48, middle - 18, 36, 36, colour, 8)
            text(SUMS + step * 48 + 18, middle + 6, f"S{'₁₂₃'[step]}", 16, "on_step", weight="600")
        line(f"M{logits_end + 14} {middle}H{LOGPS - 14}")
        line(f"M{logps_end + 14} {middle}H{SUMS - 14}")

    centre = (ROWS[0][1] + ROWS[1][1]) / 2
    for step, colour in enumerate(STEPS):
        x = SUMS + step * 48 + 18
        line(f"M{x} {ROWS[0][1] + 22}V{ROWS[1][1] - 22}", colour, tip=False, width=3)
    line(f"M{SUMS + 132 + 14} {centre}H{LOSS - 12}")
    box(LOSS - 4, centre - 30, 136, 60, "none", 10, "ink")
    text(LOSS + 64, centre - 4, "loss", 18, weight="600")
    text(LOSS + 64, centre + 17, "DPO, IPO, SimPO …", 12.5, "soft")

    text(LOGITS + (PROMPT * PITCH - 6) / 2 - 6, 277, "prompt", 13, "soft")
    text(LOGITS + (PROMPT * PITCH - 6) / 2 - 6, 293, "not read", 13, "soft")
    token = PROMPT
    for step, (length, colour) in enumerate(zip(LENGTHS[1], STEPS, strict=True)):
        x = LOGITS + token * PITCH + (length * PITCH - (PITCH - CELL)) / 2
        text(x, 277, f"step {step + 1}", 11, colour, weight="600")
        token += length

    across = (LOGITS + PROMPT * PITCH + logits_end) / 2
    line(f"M{LOSS + 64} {centre + 38}V330Q{LOSS + 64} 340 {LOSS + 54} 340H{across + 10}Q{across} 340 {across} 330V304")
    text((LOSS + across) / 2, 332, "gradient", 15, weight="600")
    way_back = "one number a token comes back; the logits are read once more, no softmax is stored"
    text((LOSS + across) / 2, 361, way_back, 13, "soft")
    return "\n".join([*parts, "</svg>", ""])


def main(argv: list[str]) -> int:
    stale = []
    for name, theme in THEMES.items():
        path, drawn = FOLDER / f"flow-{name}.svg", figure(theme)
        if not path.exists() or path.read_text(encoding="utf-8") != drawn:
            stale.append(path.name)
            if "--check" not in argv:
                path.write_text(drawn, encoding="utf-8")
    if stale:
        print(f"{'stale' if '--check' in argv else 'wrote'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
