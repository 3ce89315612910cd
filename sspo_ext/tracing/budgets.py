# SPDX-License-Identifier: Apache-2.0
"""A picture of budget curves: how often models are right if their answer is demanded early."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from ..signals.probing.budget import BudgetCurve

_COLOURS = ("#c8553d", "#1f6f8b", "#e0a458", "#6a8d73", "#7d5ba6", "#2b2b2b")


def draw_budget_curves(curves: Mapping[str, BudgetCurve], path: str | PathLike) -> None:
    """Draw budget curves into a PNG file: accuracy against the budget, and the area under each.

    Args:
        curves: of `budget_curve`, by name; all by steps or all by tokens.
        path: the file to write.

    Raises:
        ValueError: if there is no curve, or some are by steps and others by tokens.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> from sspo_ext.signals import BudgetCurve
        >>> from sspo_ext.tracing.budgets import draw_budget_curves
        >>> before = BudgetCurve("tokens", (0, 10, 20), (0.0, 0.5, 1.0), (0.0, 10.0, 20.0))
        >>> after = BudgetCurve("tokens", (0, 10, 20), (0.0, 1.0, 1.0), (0.0, 10.0, 10.0))
        >>> draw_budget_curves({"before": before, "after": after}, "budgets.png")
    """
    units = {curve.by for curve in curves.values()}
    if len(units) != 1:
        raise ValueError(f"curves: expected some, all by steps or all by tokens, got {sorted(units) or 'none'}")
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):  # pyright: ignore[reportArgumentType]  # its names are a literal type
        figure, axis = plt.subplots(figsize=(6.4, 3.8), dpi=120, layout="constrained")
        for (name, curve), colour in zip(curves.items(), _COLOURS * len(curves), strict=False):
            label = f"{name}: area {curve.area:.2f}, ends at {curve.spent[-1]:.0f} tokens"
            axis.plot(curve.budgets, curve.accuracy, color=colour, lw=2, marker="o", ms=4, label=label)
        unit = units.pop()
        axis.set(
            title=f"Right, if the answer is demanded after so many {unit}", xlabel=f"{unit} of the completion",
            xlim=(0, None), ylim=(-0.02, 1.02),
        )  # fmt: skip
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axis.legend(frameon=False, loc="lower right")
        figure.savefig(path)
        plt.close(figure)
