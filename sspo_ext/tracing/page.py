# SPDX-License-Identifier: Apache-2.0
"""One HTML page of traced chains. It loads no scripts or fonts, and shows any alphabet and any length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .picture import answer_of, prompt_of, shade, signed

_OPEN = 10  # so many chains are unfolded at first

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 5rem; max-width: 68rem; background: #fff; color: #2b2b2b;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif, "Apple Color Emoji", "Segoe UI Emoji", "Noto Color Emoji"; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; }
.quiet { color: #77726a; }
.legend span { padding: .1rem .5rem; border-radius: .2rem; margin-right: .4rem; white-space: nowrap; }
.bar { position: sticky; top: 0; background: #fffffff2; padding: .6rem 0; border-bottom: 1px solid #e3dfd8; }
.bar label { margin-right: 1rem; cursor: pointer; }
details { border-bottom: 1px solid #e3dfd8; }
summary { display: grid; grid-template-columns: 3.2rem 9.5rem 1fr; gap: .8rem; align-items: center; padding: .55rem 0;
  cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary .text { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
details[open] summary .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.reward { font-weight: 600; text-align: center; border-radius: .25rem; padding: .1rem 0; }
.right { background: #d5e4e9; } .wrong { background: #f3dcd6; }
table { border-collapse: separate; border-spacing: 0 2px; width: 100%; margin: .1rem 0 1.1rem; table-layout: fixed; }
td { padding: .28rem .6rem; vertical-align: top; }
td.n, td.a { text-align: right; font-variant-numeric: tabular-nums; }
td.n { width: 3.2rem; color: #77726a; } td.a { width: 5rem; } td.v { width: 11rem; background: #fff !important; }
td.s { white-space: pre-wrap; overflow-wrap: anywhere; }
.value { display: flex; align-items: center; gap: .5rem; font-variant-numeric: tabular-nums; }
.value i { display: block; height: .7rem; background: #1f6f8b; border-radius: 1px; min-width: 1px; }
.value div { width: 7rem; background: #f0ede8; }
body:has(#only-right:checked) .is-wrong, body:has(#only-wrong:checked) .is-right { display: none; }
svg { display: block; }
@media (max-width: 40rem) { td.v, summary svg { display: none; } summary { grid-template-columns: 3rem 1fr; } }
"""


def write_page(rows: Sequence[dict], path: str | os.PathLike, *, title: str = "Traced chains") -> None:
    """Write traced chains as one HTML page.

    A chain is a line with its curve of values. It unfolds to its steps, coloured by advantage. All text is escaped.

    Args:
        rows: of `trace_values`.
        path: of the page.
        title: of the page.
    """
    right = sum(row["reward"] > 0 for row in rows)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="quiet">{len(rows)} chains, {right} with a reward. A value, between 0 and 1, tells what the model's own answers
after a step are worth. A step's colour and number show its advantage; its colour is relative to the chain's
largest.</p>
<p class="legend"><span style="background:{shade(-1)}">harmful</span><span style="background:{shade(-0.4)}">&nbsp;
</span><span style="background:{shade(0)}">no change</span><span style="background:{shade(0.4)}">&nbsp;
</span><span style="background:{shade(1)}">helpful</span></p>
<div class="bar"><label><input type="radio" name="show" checked> all</label>
<label><input type="radio" name="show" id="only-right"> with a reward</label>
<label><input type="radio" name="show" id="only-wrong"> without</label></div>
{"".join(_chain(row, number < _OPEN) for number, row in enumerate(rows))}
</body>
</html>
"""
    temporary = Path(f"{os.fspath(path)}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def _chain(row: dict, unfolded: bool) -> str:
    kind = "right" if row["reward"] > 0 else "wrong"
    scale = max([abs(a) for a in row["advantages"]] + [0.02])
    steps = "".join(
        f'<tr style="background:{shade(a / scale)}"><td class="n">{k}</td><td class="s" dir="auto">'
        f'{escape(step.strip(chr(10)))}</td><td class="a">{signed(a)}</td><td class="v">{_value(v)}</td></tr>\n'
        for k, (step, a, v) in enumerate(zip(row["steps"], row["advantages"], row["values"][1:], strict=True), 1)
    )
    first = (
        f'<tr><td class="n"></td><td class="s quiet">the question alone; the answer is {escape(answer_of(row))}</td>'
        f'<td class="a"></td><td class="v">{_value(row["values"][0])}</td></tr>\n'
    )
    return (
        f'<details class="is-{kind}"{" open" if unfolded else ""}><summary><span class="reward {kind}">'
        f'{row["reward"]:g}</span>{_curve(row["values"])}<span class="text" dir="auto">{escape(prompt_of(row).strip())}'
        f"</span></summary>\n<table>{first}{steps}</table></details>\n"
    )


def _value(value: float) -> str:
    return f'<div class="value"><div><i style="width:{100 * value:.1f}%"></i></div>{value:.2f}</div>'


def _curve(values: Sequence[float], width: int = 150, height: int = 30) -> str:
    """A small line chart of the values, as SVG."""
    across = (width - 6) / max(len(values) - 1, 1)
    points = [(3 + i * across, 3 + (height - 6) * (1 - v)) for i, v in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{points[0][0]:.1f},{height - 3} {line} {points[-1][0]:.1f},{height - 3}"
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="values">'
        f'<path d="M3 {height - 3}H{width - 3}" stroke="#d8d3ca"/>'
        f'<polygon points="{area}" fill="#1f6f8b" opacity=".13"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f6f8b" stroke-width="1.6"/>'
        f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.4" fill="#1f6f8b"/></svg>'
    )
