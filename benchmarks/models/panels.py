# SPDX-License-Identifier: Apache-2.0
"""The style that the plots of the model runs share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_STYLE: dict = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


@contextlib.contextmanager
def panels(path: Path, count: int, size: tuple[float, float], **style) -> Iterator:
    """Gives `count` matplotlib axes side by side, and writes them to `path` at the end.

    Args:
        path: of the PNG.
        count: number of axes.
        size: width and height of all together, in inches.
        **style: more of matplotlib's rcParams, with underscores for dots.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    more: dict = {name.replace("_", "."): value for name, value in style.items()}
    with plt.rc_context(_STYLE | more):
        figure, axes = plt.subplots(1, count, figsize=size, dpi=120, layout="constrained")
        yield axes
        figure.savefig(path)
        plt.close(figure)
