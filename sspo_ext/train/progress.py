"""A training run in one picture: accuracy against tokens, and both over updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

_TOKENS = "completions/mean_length"

_COLOURS = ("#1f6f8b", "#c8553d", "#e0a458", "#6a8d73", "#7d5ba6", "#2b2b2b")


def curves(log_history: Sequence[Mapping]) -> dict[str, list[float]]:
    """update, accuracy and tokens of the logged batches of rollouts."""
    rows = [row for row in log_history if "accuracy" in row and _TOKENS in row]
    return {
        "update": [row["step"] for row in rows],
        "accuracy": [row["accuracy"] for row in rows],
        "tokens": [row[_TOKENS] for row in rows],
    }


def draw_progress(runs: Mapping[str, Mapping[str, Sequence[float]]], path: str | PathLike) -> None:
    """Writes a PNG from `curves` of one or more named runs. Lines are means over up to an eighth of the run."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, (path_axis, accuracy, tokens) = plt.subplots(1, 3, figsize=(12, 3.8), dpi=120, layout="constrained")
        for (name, run), colour in zip(runs.items(), _COLOURS * len(runs), strict=False):
            draw_path(path_axis, run, name, colour)
            for axis, key in ((accuracy, "accuracy"), (tokens, "tokens")):
                axis.plot(run["update"], run[key], color=colour, lw=0.6, alpha=0.4)
                axis.plot(run["update"], smooth(run[key]), color=colour, lw=2, label=name)
        finish_path(path_axis)
        accuracy.set(title="Accuracy of sampled completions", xlabel="update", ylim=(-0.03, 1.03))
        accuracy.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        tokens.set(title="Tokens of a completion", xlabel="update", ylim=(0, None))
        if len(runs) > 1:
            accuracy.legend(frameon=False, loc="lower right")
        figure.savefig(path)
        plt.close(figure)


def draw_path(axis, run: Mapping[str, Sequence[float]], name: str, colour: str) -> None:
    """Accuracy against tokens, from the circle to the arrow's head."""
    x, y = smooth(run["tokens"]), smooth(run["accuracy"])
    if not x:
        return
    axis.plot(x, y, color=colour, lw=1.5, label=name)
    axis.plot(x[0], y[0], "o", color=colour, mfc="white")
    axis.plot(x[-1], y[-1], "o", color=colour)


def finish_path(axis) -> None:
    axis.set(title="Accuracy against tokens, ○ start ● end", xlabel="tokens of a completion", ylim=(-0.03, 1.03))
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


def smooth(values: Sequence[float]) -> list[float]:
    width = max(1, len(values) // 8)
    return [sum(values[max(i - width + 1, 0) : i + 1]) / min(width, i + 1) for i in range(len(values))]
