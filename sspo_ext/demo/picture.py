# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: how right, how long, and one problem as the three models solve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ..train.progress import smooth

OUTCOME, SSPO, INK, PALE = "#b8860b", "#1f6f8b", "#2b2b2b", "#8a8a8a"

NEEDED, IDLE = "#2f6b4f", "#eeeae3"

NAMES = {
    "start": ("before training", PALE), "outcome": ("trained on the outcome only", OUTCOME),
    "sspo": ("trained by SSPO", SSPO),
}  # fmt: skip

LINES = 12  # steps of a solution that are drawn


def draw(result: dict, path: str | PathLike) -> None:
    """Draws what `run` returns into a PNG file.

    Args:
        result: What `run` returns.
        path: The file to write.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 13,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK, "axes.labelcolor": INK,
    }  # fmt: skip
    stages = result["stages"]
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12.5, 8.6), dpi=110, layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.45])
        right, tokens, course = halves[0].subplots(1, 3, width_ratios=[1, 1, 0.9])
        _bars(right, {name: 100 * stage["sampled"]["accuracy"] for name, stage in stages.items()}, "{:.0f} %")
        right.set(title=f"Right answers to {result['config']['held_out']} new sums", xlim=(0, 125))
        _bars(tokens, {name: stage["sampled"]["tokens"] for name, stage in stages.items()}, "{:.1f}")
        tokens.set(title="Length of a solution, tokens")
        tokens.set_yticklabels([])
        for name, run in result["curves"].items():
            course.plot(run["update"], run["tokens"], color=NAMES[name][1], lw=0.6, alpha=0.4)
            course.plot(run["update"], smooth(run["tokens"]), color=NAMES[name][1], lw=2.5, label=NAMES[name][0])
        course.set(title="Length while it trains", xlabel="update", ylabel="tokens of a solution", ylim=(0, None))
        course.legend(frameon=False, loc="lower left", fontsize=10)
        draw_solutions(halves[1], result["chains"], result["problems"])
        figure.suptitle(headline(stages), fontsize=15, fontweight="bold")
        figure.savefig(path)
        plt.close(figure)


def headline(stages: Mapping[str, Mapping]) -> str:
    """The two numbers that the picture is about, of sampled solutions."""
    ours, theirs = (stages[name]["sampled"] for name in ("sspo", "outcome"))
    return (
        f"SSPO: solutions {1 - ours['tokens'] / theirs['tokens']:.0%} shorter than with outcome-only training, "
        f"right answers {ours['accuracy']:.0%} against {theirs['accuracy']:.0%}"
    )


def _bars(axis, values: Mapping[str, float], form: str) -> None:
    """One bar for each stage, the first on top."""
    for y, (name, value) in enumerate(values.items()):
        axis.barh(y, value, 0.62, color=NAMES[name][1])
        axis.annotate(
            form.format(value), (value, y), (5, 0), textcoords="offset points", va="center", fontweight="bold"
        )
    axis.set_yticks(range(len(values)), [NAMES[name][0].replace(" on ", "\non ") for name in values])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xticks([])
    axis.margins(x=0.18)


def typical(chains: Mapping[str, Sequence[dict]]) -> int:
    """The problem whose solutions are drawn: of those that all stages solve, the median by the steps that SSPO saves.

    Args:
        chains: For each stage what `chains_of` returns, of the same problems.

    Returns:
        Its index. If no problem is solved by all, all take part.
    """
    every = range(len(chains["start"]))
    solved = [i for i in every if all(stage[i]["right"] for stage in chains.values())] or list(every)
    saved = sorted(solved, key=lambda i: (len(chains["outcome"][i]["steps"]) - len(chains["sspo"][i]["steps"]), i))
    return saved[len(saved) // 2]


def draw_solutions(figure, chains: Mapping[str, Sequence[dict]], problems: Sequence[str]) -> None:
    """Draws how each stage solves the same problem, chosen by `typical`. Steps that repeat or add nothing are pale.

    Args:
        figure: A figure or subfigure of matplotlib.
        chains: For each stage what `chains_of` returns.
        problems: The prompts of the chains.
    """
    chosen = typical(chains)
    shown = {name: chain[chosen] for name, chain in chains.items()}
    rows = max(min(len(chain["steps"]), LINES) for chain in shown.values())
    axes = figure.subplots(1, len(shown))
    problem = problems[chosen].strip().removesuffix("= ?").strip()
    figure.suptitle(
        f"One problem, {problem}:  needed steps in green, steps that add nothing in grey",
        fontsize=13, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    for axis, (name, chain) in zip(axes, shown.items(), strict=True):
        label, colour = NAMES[name]
        steps = shortened(chain["steps"])
        idle = sum(not step["needed"] for step in chain["steps"])
        axis.axis("off")
        axis.set(xlim=(0, 1), ylim=(rows, 0))
        axis.set_title(f"{label}: {len(chain['steps'])} steps, {idle} idle", color=colour, fontsize=11, loc="left")
        for k, step in enumerate(steps):
            ink = "white" if step["needed"] else PALE
            axis.axhspan(k + 0.06, k + 0.94, 0.0, 0.86, color=NEEDED if step["needed"] else IDLE, lw=0)
            axis.text(0.03, k + 0.5, step["text"], family="monospace", va="center", color=ink)
        mark, tint = ("\u2713", "#2e7d32") if chain["right"] else ("\u2717", "#b3261e")
        axis.text(0.92, len(steps) - 0.5, mark, va="center", ha="center", color=tint, fontsize=18, fontweight="bold")


def shortened(chain: Sequence[dict], most: int = LINES) -> list[dict]:
    """At most `most` steps: three dots stand for those left out before the last."""
    if len(chain) <= most:
        return list(chain)
    return [*chain[: most - 2], {"text": "...", "needed": False}, chain[-1]]
