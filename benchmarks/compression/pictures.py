# SPDX-License-Identifier: Apache-2.0
"""The plot of a task: accuracy against tokens, and every arm's accuracy with its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .arms import ARMS, Arm
from .verdicts import accuracy, total

_COLOURS = {
    "start": "#444444", "rloo": "#e8871e", "grpo": "#a0522d", "penalty-0.25": "#f2b8b5", "penalty-0.5": "#e0736d",
    "penalty-1": "#b3261e", "sspo-0": "#1b6ca8", "sspo-9": "#17a398", "no-discount": "#9aa0a6", "pairs": "#7b4fa3",
    "whole-pairs": "#d17bd1", "shortest": "#7b4fa3", "short": "#d17bd1",
}  # fmt: skip

_MARKERS = {"start": "s", "-zero": "v", "-shuffled": "X", "-likelihood": "P"}

GAP = 0.1


def draw(arms: Mapping[str, list[dict]], path: Path, title: str, catalogue: Mapping[str, Arm] = ARMS) -> None:
    """Writes a PNG. Does nothing without matplotlib.

    A mark is an arm's mean over its seeds, with 1.96 standard errors over problems. A small pale mark is one seed. Arms
    far below the rest (`lowest_shown`) stand in a grey strip below the axis of accuracy, with their numbers.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    names = [name for name in catalogue if name in arms]
    style: dict = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        heights = [4.6, 0.9 + 0.25 * len(names)]
        figure, axes = plt.subplots(
            2, 2, figsize=(13, sum(heights)), dpi=110, layout="constrained", height_ratios=heights
        )
        for how, (plane, lines) in zip(("greedy", "sampled"), axes.T, strict=True):
            marks = [_Mark(name, arms[name], how, catalogue) for name in names]
            _plane(plane, marks)
            _list(lines, marks)
            plane.set_title(f"{title}: {how}")
        axes[1, 1].set_yticklabels([])
        axes[0, 0].set_ylabel("right answers, held-out problems")
        figure.savefig(path)
        plt.close(figure)


def lowest_shown(means: Sequence[float]) -> float:
    """The lowest accuracy that the axis shows.

    The widest gap between two neighbouring accuracies separates the arms. If it is wider than `GAP`, and at least half
    of the arms lie above it, only those are shown. Otherwise all are.
    """
    ordered = sorted(means)
    gap, upper = max(((b - a, b) for a, b in zip(ordered, ordered[1:], strict=False)), default=(0.0, ordered[0]))
    return upper if gap > GAP and sum(m >= upper for m in means) * 2 >= len(means) else ordered[0]


class _Mark:
    """How an arm is drawn."""

    def __init__(self, name: str, runs: list[dict], how: str, catalogue: Mapping[str, Arm]):
        # A control has the colour of its arm.
        parent = max((p for p in _COLOURS if name.startswith(p)), key=len)
        text = catalogue[name].text
        self.text = f"{catalogue[parent].text} {text}" if text.startswith("...") else text
        self.colour = _COLOURS[parent]
        self.marker = next((m for end, m in _MARKERS.items() if name.endswith(end)), "o")
        self.mean, self.error = accuracy(runs, how)
        self.tokens = total(runs, how, "tokens")
        self.seeds = [(total([run], how, "tokens"), accuracy([run], how)[0]) for run in runs] if len(runs) > 1 else []
        self.options = {"color": self.colour, "marker": self.marker, "mec": "white", "mew": 0.6}


def _limits(marks: Sequence[_Mark]) -> tuple[float, float, list[_Mark]]:
    """The two ends of the axis of accuracy, and the arms below it, best first."""
    low = lowest_shown([mark.mean for mark in marks])
    inside = [mark for mark in marks if mark.mean >= low]
    ends = [mark.mean + sign * mark.error for mark in inside for sign in (-1, 1)]
    ends += [seed for mark in inside for _, seed in mark.seeds]
    space = 0.04 * (max(ends) - min(ends)) or 0.02
    below = sorted((mark for mark in marks if mark.mean < low), key=lambda mark: -mark.mean)
    return min(ends) - space, min(max(ends) + space, 1 + space), below


def _plane(axis, marks: Sequence[_Mark]) -> None:
    bottom, top, below = _limits(marks)
    row = 0.065 * (top - bottom)
    for mark in marks:
        inside = [(x, y) for x, y in mark.seeds if y >= bottom]
        axis.plot([x for x, _ in inside], [y for _, y in inside], ls="", ms=4, alpha=0.4, **mark.options)
        if mark not in below:
            axis.errorbar(mark.tokens, mark.mean, mark.error, ms=9, lw=1.2, label=mark.text, **mark.options)
    for k, mark in enumerate(below):
        y = bottom - (k + 0.5) * row
        axis.plot(mark.tokens, y, ms=9, **mark.options)
        axis.annotate(f"{mark.mean:.3f}", (mark.tokens, y), (8, 0), textcoords="offset points", va="center", size=8)
    if below:
        axis.axhspan(bottom - len(below) * row, bottom, color="#eeeeee", lw=0, zorder=0)
        axis.annotate(
            "far below", (0, bottom - len(below) * row / 2), (-5, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", size=8, color="#777777",
        )  # fmt: skip
    axis.set_ylim(bottom - len(below) * row, top)
    axis.set_yticks([tick for tick in axis.get_yticks() if bottom <= tick <= top])
    axis.set_xlabel("tokens of a solution")


def _list(axis, marks: Sequence[_Mark]) -> None:
    bottom, top, below = _limits(marks)
    for k, mark in enumerate(marks):
        seeds = [seed for _, seed in mark.seeds if seed >= bottom]
        axis.plot(seeds, [k] * len(seeds), ls="", ms=4, alpha=0.4, **mark.options)
        if mark in below:
            axis.annotate(f"◂ {mark.mean:.3f}", (0.03, k), xycoords=("axes fraction", "data"), va="center", size=8)
            axis.plot(0.015, k, ms=8, transform=axis.get_yaxis_transform(), **mark.options)
            continue
        axis.errorbar(mark.mean, k, xerr=mark.error, ms=8, lw=1.2, **mark.options)
    axis.set_yticks(range(len(marks)), [mark.text for mark in marks], size=8.5)
    axis.set(xlim=(bottom, top), ylim=(len(marks) - 0.4, -0.6), xlabel="right answers ± 1.96 standard errors")
    axis.grid(axis="x", lw=0.4, color="#dddddd")
    axis.set_axisbelow(True)
