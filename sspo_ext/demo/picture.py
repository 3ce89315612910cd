# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: accuracy against tokens while it trains, and one problem's steps before and after."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from ..tracing.picture import signed
from ..train.progress import draw_path, finish_path, smooth

OUTCOME, SSPO, INK, PALE = "#b8860b", "#1f6f8b", "#2b2b2b", "#8a8a8a"

_NAMES = {"outcome": ("outcome only (RLOO)", OUTCOME), "sspo": ("SSPO", SSPO)}


def draw(result: dict, path: str | PathLike) -> None:
    """Draws what `run` returns into a PNG file.

    Args:
        result: What `run` returns.
        path: The file to write.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    stages = result["stages"]
    style: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK, "axes.labelcolor": INK,
    }  # fmt: skip
    with plt.rc_context(style):
        figure = plt.figure(figsize=(13, 8.4), dpi=120, layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.25])
        top, bottom = halves
        plane, tokens, bars = top.subplots(1, 3)
        for name, run in result["curves"].items():
            label, colour = _NAMES[name]
            draw_path(plane, run, label, colour)
            tokens.plot(run["update"], run["tokens"], color=colour, lw=0.6, alpha=0.4)
            tokens.plot(run["update"], smooth(run["tokens"]), color=colour, lw=2, label=label)
        finish_path(plane)
        plane.legend(frameon=False)
        most = max(max(run["tokens"], default=1) for run in result["curves"].values())
        tokens.set(title="Tokens of a sampled solution", xlabel="update", ylim=(0, 1.05 * most))
        _bars(bars, stages)
        draw_chains(bottom, result["chains"], result["problems"])
        before, after = stages["start"]["greedy"], stages["sspo"]["greedy"]
        title = (
            f"SSPO on held-out sums, greedy: right answers {before['accuracy']:.0%} → {after['accuracy']:.0%}, "
            f"tokens {before['tokens']:.0f} → {after['tokens']:.0f}"
        )
        figure.suptitle(title, fontsize=13, fontweight="bold")
        figure.savefig(path)
        plt.close(figure)


def _bars(axis, stages: dict) -> None:
    """Draws the share of right answers at each stage."""
    names = {"start": ("start", PALE), "outcome": ("outcome\nonly", OUTCOME), "sspo": ("SSPO", SSPO)}
    for x, (name, stage) in enumerate(stages.items()):
        for shift, how, alpha in ((-0.2, "greedy", 1.0), (0.2, "sampled", 0.55)):
            height = stage[how]["accuracy"]
            axis.bar(x + shift, height, 0.38, color=names[name][1], alpha=alpha)
            axis.annotate(f"{height:.0%}", (x + shift, height), (0, 2), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(stages)), [names[name][0] for name in stages])
    axis.set(title="Held-out right answers: greedy, sampled (pale)", ylim=(0, 1.08))
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


def draw_chains(figure, chains: dict, problems: Sequence[str]) -> None:
    """Draws the solutions before and after of the problem that loses most steps.

    Each step has the colour of its advantage.

    Args:
        figure: A figure or subfigure of matplotlib.
        chains: For "start" and "sspo" what `chains_of` returns.
        problems: The prompts of the chains.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    before, after = chains["start"], chains["sspo"]

    def telling(i: int) -> tuple:
        steps = [chain[i]["steps"] for chain in (before, after)]
        return before[i]["right"] and after[i]["right"], min(len(steps[0]), 14) - len(steps[1]), -i

    best = max(range(len(before)), key=telling)
    shown = (("before", before[best]["steps"]), ("after SSPO", after[best]["steps"]))
    problem = problems[best].strip().removesuffix("?").strip().removesuffix("=").strip()
    # A redundant step costs a few hundredths, while the last needed one gains nearly 1.
    norm, colours = SymLogNorm(0.02, vmin=-1, vmax=1), plt.get_cmap("RdBu")
    rows = max(min(len(chain), 14) for _, chain in shown)
    axes = figure.subplots(1, 2)
    for axis, (name, chain) in zip(axes, shown, strict=True):
        axis.axis("off")
        axis.set(xlim=(0, 1), ylim=(14.5 - max(rows, 8), 14.5), title=f"{problem}, {name}: {len(chain)} steps")
        for k, step in enumerate(_shortened(chain)):
            y = 14 - k
            shade = float(norm(step["advantage"]))
            axis.axhspan(y - 0.46, y + 0.46, 0.0, 0.62, color=colours(shade), alpha=0.75, lw=0)
            ink = "white" if abs(shade - 0.5) > 0.35 else INK
            axis.text(0.015, y, step["text"], family="monospace", va="center", color=ink)
            if step["text"] != "...":
                axis.text(0.64, y, f"advantage {signed(step['advantage'])}", va="center", color=INK)
    ticks = [-1, -0.1, -0.02, 0, 0.02, 0.1, 1]
    bar = figure.colorbar(
        plt.cm.ScalarMappable(norm, colours), ax=axes, fraction=0.02, ticks=ticks, label="advantage of the step"
    )
    bar.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:+g}".replace("-", "\u2212") if tick else "0" for tick in ticks])


def _shortened(chain: Sequence[dict], most: int = 14) -> list[dict]:
    """At most `most` steps: three dots stand for those left out before the last."""
    if len(chain) <= most:
        return list(chain)
    return [*chain[: most - 2], {"text": "...", "advantage": 0.0}, chain[-1]]
