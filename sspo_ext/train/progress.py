# SPDX-License-Identifier: Apache-2.0
"""A training run in one picture: accuracy against tokens, and both over updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

_TOKENS = "completions/mean_length"

_COLOURS = ("#1f6f8b", "#c8553d", "#e0a458", "#6a8d73", "#7d5ba6", "#2b2b2b")


def curves(log_history: Sequence[Mapping]) -> dict[str, list[float]]:
    """The course of a run of `SSPOTrainer`, from its log.

    Args:
        log_history: `trainer.state.log_history`.

    Returns:
        "update", "accuracy" and "tokens" (mean length of a completion), each a list with one number per logged update.
    """
    rows = [row for row in log_history if "accuracy" in row and _TOKENS in row]
    return {
        "update": [row["step"] for row in rows],
        "accuracy": [row["accuracy"] for row in rows],
        "tokens": [row[_TOKENS] for row in rows],
    }


def draw_progress(runs: Mapping[str, Mapping[str, Sequence[float]]], path: str | PathLike) -> None:
    """Draws runs into a PNG file: accuracy against tokens, and both over the updates.

    Thick lines are means over the last eighth of the updates up to each point.

    Args:
        runs: For each run its name and what `curves` returns.
        path: The file to write.

    Raises:
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import tempfile
        >>> from sspo_ext.train.progress import curves, draw_progress
        >>> log = [{"step": k, "accuracy": k / 9, "completions/mean_length": 40.0 - k} for k in range(10)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_progress({"training": curves(log)}, folder + "/progress.png")
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
    }
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
    """Draws accuracy against tokens, from an open circle to a filled one."""
    x, y = smooth(run["tokens"]), smooth(run["accuracy"])
    if not x:
        return
    axis.plot(x, y, color=colour, lw=1.5, label=name)
    axis.plot(x[0], y[0], "o", color=colour, mfc="white")
    axis.plot(x[-1], y[-1], "o", color=colour)


def finish_path(axis) -> None:
    """Gives the axis of `draw_path` its title, labels and limits."""
    axis.set(title="Accuracy against tokens, ○ start ● end", xlabel="tokens of a completion", ylim=(-0.03, 1.03))
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a window of an eighth of the values that ends at each."""
    width = max(1, len(values) // 8)
    return [sum(values[max(i - width + 1, 0) : i + 1]) / min(width, i + 1) for i in range(len(values))]
