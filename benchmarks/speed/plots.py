# SPDX-License-Identifier: Apache-2.0
"""Plots of the tables."""

from __future__ import annotations

from pathlib import Path

from .tables import Table

# A contestant has the same colour in every plot.
COLOURS = {
    "sspo_ext": "#d1495b",
    "LigerFusedLinearDPOLoss": "#30638e",
    "plain torch": "#8d99ae",
    "TRL chunked log-probs": "#edae49",
}

LABELS = {
    "LigerFusedLinearDPOLoss": "Liger fused DPO",
    "torch.compile of it": "torch.compile(log_softmax + gather)",
    "one copy of the logits into an existing buffer": "(one copy of the logits)",
}


def draw(folder: Path, found: dict[str, Table]) -> dict[str, list[str]]:
    """Writes PNG files. Returns the file names of each table; without matplotlib an empty dict."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    drawn = {}
    for name, axis in (("linear-length", "tokens in a sequence"), ("linear-vocabulary", "vocabulary")):
        if name in found:
            _time_and_memory(found[name], axis, folder / f"{name}.png")
            drawn[name] = [f"{name}.png"]
    if "linear-memory" in found:
        _memory(found["linear-memory"], folder / "linear-memory.png")
        drawn["linear-memory"] = ["linear-memory.png"]
    bars = [found[name] for name in ("logits-fp32", "logits-bf16") if name in found]
    if bars:
        _bars(bars, folder / "logits.png")
        drawn[bars[-1].name] = ["logits.png"]
    return drawn


def draw_losses(folder: Path, found: list[Table]) -> list[str]:
    """Writes one plot of times, a panel a table. Returns its file name; without matplotlib an empty list."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    _bars(found, folder / "losses.png")
    return ["losses.png"]


def _axes(count: int, width: float = 5.2, height: float = 3.6):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes[0]


def _finish(figure, table: Table, path: Path) -> None:
    from matplotlib import pyplot

    cores = table.machine.get("cores", "? (").replace(" (", " cores (")
    figure.text(1.0, -0.005, f"{cores}; load {table.load[0]:.1f}", ha="right", va="top", fontsize=7, color="#888888")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def _lines(axis, x: list, series: dict[str, list], label_x: str, label_y: str) -> None:
    for name, values in series.items():
        mine = name.startswith("sspo_ext")
        colour = COLOURS.get(name, "#555555")
        kept = [(a, b) for a, b in zip(x, values, strict=True) if not isinstance(b, str)]
        axis.plot(*zip(*kept, strict=True), marker="o", markersize=4, color=colour, linewidth=2.4 if mine else 1.6,
                  zorder=3 if mine else 2, label=LABELS.get(name, name))  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(x, [f"{v:,}" for v in x])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(label_x)
    axis.set_title(label_y, loc="left", fontsize=10)


def _time_and_memory(table: Table, label: str, path: Path) -> None:
    half = (len(table.columns) - 1) // 2
    figure, (left, right) = _axes(2)
    x = [row[0] for row in table.rows]
    for axis, at, what in ((left, 1, "time, ms"), (right, 1 + half, "peak extra memory, MiB")):
        names = [column.rsplit(",", 1)[0] for column in table.columns[at : at + half]]
        series = {name: [row[at + i] for row in table.rows] for i, name in enumerate(names)}
        _lines(axis, x, series, label, what)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(table.title, fontsize=10, x=0.01, ha="left")
    _finish(figure, table, path)


def _memory(table: Table, path: Path) -> None:
    """Peak extra memory of each contestant against tokens, less the gradients asked for."""
    half = (len(table.columns) - 1) // 2
    totals = [int(column.split()[0]) for column in table.columns[1 : 1 + half]]
    figure, (axis,) = _axes(1, width=6.4)
    styles = {"sspo_ext, steps of 32": "-", "sspo_ext, one step a response": "--", "sspo_ext, frozen head": ":"}
    for row in table.rows:
        colour = COLOURS.get(row[0].split(",")[0], "#555555")
        kept = [(a, b) for a, b in zip(totals, row[1 + half :], strict=True) if not isinstance(b, str)]
        width = 2.2 if row[0].startswith("sspo_ext") else 1.6
        axis.plot(*zip(*kept, strict=True), styles.get(row[0], "-"), marker="o", markersize=4, color=colour,
                  linewidth=width, label=LABELS.get(row[0], row[0]))  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(totals, [f"{t:,}" for t in totals])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("tokens")
    axis.set_title("peak extra memory less the gradients asked for, MiB", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    _finish(figure, table, path)


def _bars(found: list[Table], path: Path) -> None:
    """Times of the logits route, one panel for each table."""
    figure, axes = _axes(len(found), width=5.6, height=3.2)
    for axis, table in zip(axes, found, strict=True):
        rows = sorted(table.rows, key=lambda row: row[1], reverse=True)
        names = [LABELS.get(str(row[0]), str(row[0])) for row in rows]
        colours = [
            COLOURS["sspo_ext"] if n.startswith("sspo_ext") else "#c9ced6" if n[0] == "(" else "#8d99ae" for n in names
        ]
        bars = axis.barh(names, [row[1] for row in rows], color=colours)
        axis.bar_label(bars, [f"{row[1]:,.0f} ms" for row in rows], padding=3, fontsize=8)
        axis.set_title(table.title, loc="left", fontsize=9)
        axis.spines["bottom"].set_visible(False)
        axis.set_xticks([])
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.grid(False)
    _finish(figure, found[0], path)
