# SPDX-License-Identifier: Apache-2.0
"""A picture of one traced chain: its steps coloured by advantage, and the values beside them."""

from __future__ import annotations

import logging
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from typing import Any

logger = logging.getLogger(__name__)

GOOD, BAD, INK, QUIET, PAPER = (0x1F, 0x6F, 0x8B), (0xC8, 0x55, 0x3D), "#2b2b2b", "#8a857c", "#f4f2ee"

WIDTH = 90  # columns of text; a wide character takes two

LINE = 0.185  # inches

MAX_STEPS, MAX_LINES = 60, 12

# The installed ones of these draw the characters that DejaVu Sans lacks.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei",
    "PingFang SC", "Hiragino Sans GB", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei", "Arial Unicode MS",
    "Noto Emoji", "Segoe UI Emoji", "Symbola",
)  # fmt: skip


def draw_chain(row: dict, path: str | PathLike, *, title: str | None = None) -> None:
    """Draw a traced chain as a PNG.

    A step's colour is its advantage relative to the chain's largest: blue is good, red is harmful. A chain of more than
    60 steps loses its middle, and the curve goes straight over the gap. A step of more than 12 lines loses the rest.

    Args:
        row: of `trace_values`.
        path: of the PNG.
        title: default: answer, reward and number of steps.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = [name for name in FONTS if name in installed] or ["sans-serif"]
    blocks = _blocks(row)
    question = wrap(prompt_of(row), WIDTH + 8)[:MAX_LINES]
    height = sum(block.height for block in blocks)
    inches = LINE * (height + len(question) + 5)
    with (
        plt.rc_context({"font.family": family, "font.size": 9, "text.parse_math": False}),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        figure = plt.figure(figsize=(11.5, inches), dpi=110)
        top = 1 - LINE * (len(question) + 3.6) / inches
        bottom = LINE * 1.0 / inches
        heading = title or f"answer {answer_of(row)}    reward {row['reward']:g}    {len(row['steps'])} steps"
        at = 1 - LINE * 1.3 / inches
        figure.text(0.02, at, heading, weight="bold", size=11, color=INK)
        for i, line in enumerate(question):
            figure.text(0.02, at - LINE * (i + 1.5) / inches, line, color=QUIET, va="center")
        texts = figure.add_axes((0.02, bottom, 0.66, top - bottom))
        curve = figure.add_axes((0.715, bottom, 0.255, top - bottom))
        _steps(texts, blocks, height)
        _curve(curve, blocks, height)
        figure.savefig(path)
        plt.close(figure)
    if any("missing from font" in str(w.message) for w in seen):
        logger.warning("%s: no installed font draws all of its text; install one of %s", path, ", ".join(FONTS[1:5]))


@dataclass(frozen=True)
class _Block:
    """A box of the picture, and the value at its lower edge."""

    lines: list[str]
    height: float  # in lines
    value: float


@dataclass(frozen=True)
class _Step(_Block):
    number: int
    advantage: float
    colour: str


def _blocks(row: dict) -> list[_Block]:
    """From top to bottom: the question, each step, and one block for the steps that are left out."""
    steps, advantages, values = row["steps"], row["advantages"], row["values"]
    scale = max([abs(a) for a in advantages] + [0.02])
    blocks = [_Block(["the question alone"], 1.5, values[0])]
    hidden = range(MAX_STEPS // 2, len(steps) - MAX_STEPS // 2) if len(steps) > MAX_STEPS else range(0)
    for k, (step, advantage) in enumerate(zip(steps, advantages, strict=True)):
        if k in hidden:
            if k == hidden[0]:
                blocks.append(_Block([f"... {len(hidden)} steps are not shown ..."], 2.0, values[hidden[-1] + 1]))
            continue
        lines = wrap(step, WIDTH)
        if len(lines) > MAX_LINES:
            lines = [*lines[: MAX_LINES - 1], "..."]
        blocks.append(_Step(lines, len(lines) + 0.7, values[k + 1], k + 1, advantage, shade(advantage / scale)))
    return blocks


def _steps(axis, blocks: Sequence[_Block], height: float) -> None:
    from matplotlib.patches import Rectangle

    axis.set(xlim=(0, 1), ylim=(height, 0))
    axis.axis("off")
    y = 0.0
    for block in blocks:
        colour, raised = QUIET, 0.1
        if isinstance(block, _Step):
            colour, raised = INK, 0.0
            axis.add_patch(Rectangle((0.045, y + 0.08), 0.955, block.height - 0.16, color=block.colour, lw=0))
            middle = y + block.height / 2
            axis.text(0.035, middle, str(block.number), ha="right", va="center", color=QUIET, size=8)
            axis.text(0.99, middle, signed(block.advantage), ha="right", va="center", color=INK, size=8.5)
        for i, line in enumerate(block.lines):
            axis.text(0.058, y + 0.85 + i - raised, line, va="center", color=colour)
        y += block.height


def _curve(axis, blocks: Sequence[_Block], height: float) -> None:
    edges = list(accumulate(block.height for block in blocks))
    axis.set(xlim=(-0.02, 1.02), ylim=(height, 0), yticks=[])
    for edge in edges:
        axis.axhline(edge, color="#e3dfd8", lw=0.6, zorder=0)
    points = [block.value for block in blocks]
    axis.fill_betweenx(edges, 0, points, color="#1f6f8b", alpha=0.10, lw=0)
    axis.plot(points, edges, "-o", color="#1f6f8b", lw=1.6, ms=3.5, clip_on=False)
    top = max(range(len(points)), key=lambda i: points[i])
    for i in sorted({0, top, len(points) - 1}):
        if i == top < len(points) - 1 and abs(points[i] - points[-1]) < 0.03:
            continue
        left = points[i] > 0.85
        axis.annotate(
            f"{points[i]:.2f}", (points[i], edges[i]), (-7 if left else 7, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", size=8, color=INK,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip
    axis.xaxis.tick_top()
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.set_title("value after each step", size=9, color=INK, pad=6, loc="left")
    axis.tick_params(colors=INK, length=2)
    for side in ("right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def signed(value: float) -> str:
    """A number with its sign and two decimals; what rounds to zero has no sign."""
    return f"{value:+.2f}".replace("-", "\u2212") if abs(value) >= 0.005 else "0.00"


def shade(share: float) -> str:
    """A colour from red over paper to blue, for a share in [-1, 1]."""
    base = tuple(int(PAPER[i : i + 2], 16) for i in (1, 3, 5))
    towards, t = (GOOD if share > 0 else BAD), min(abs(share), 1.0) * 0.62
    return "#" + "".join(f"{round(b + (c - b) * t):02x}" for b, c in zip(base, towards, strict=True))


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces or between wide characters. Blank lines are left out."""
    lines = []
    for paragraph in text.replace("\t", "    ").splitlines():
        line, column, space = "", 0, -1
        for c in paragraph.rstrip():
            columns = 2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1
            if column + columns > width:
                if c == " ":
                    lines.append(line)
                    line, column, space = "", 0, -1
                    continue
                cut = space + 1 if space >= 0 and columns == 1 else len(line)
                lines.append(line[:cut].rstrip())
                line = line[cut:]
                column = sum(2 if unicodedata.east_asian_width(d) in "WF" else 1 for d in line)
                space = line.rfind(" ")
            space = len(line) if c == " " else space
            line, column = line + c, column + columns
        if line.strip():
            lines.append(line)
    return lines or [""]


def prompt_of(row: dict[str, Any]) -> str:
    """The prompt as one text; each chat message is a paragraph."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(_content_text(message.get("content")) for message in prompt)


def _content_text(content: Any) -> str:
    """The text of a message. A content in parts gives the text of its parts, or their kinds in brackets."""
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(p["text"] if isinstance(p.get("text"), str) else f"[{p.get('type')}]" for p in content)


def answer_of(row: dict[str, Any]) -> str:
    """The accepted answers as one text."""
    return row["answer"] if isinstance(row["answer"], str) else " or ".join(row["answer"])
