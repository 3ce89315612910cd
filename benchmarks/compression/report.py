"""From the runs' JSON files to RESULTS.md and a picture for each task."""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from .arms import ARMS
from .verdicts import pair_verdicts, verdicts

_PENALTIES = [name for name in ARMS if name.startswith("penalty")]
HEADER = (
    "| arm | seeds | accuracy, greedy | tokens | steps | skipped | accuracy, sampled | tokens | steps | skipped "
    "| drawn | s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


_COLOURS = {
    "start": "#444444", "rloo": "#e8871e", "grpo": "#a0522d", "penalty-0.25": "#f2b8b5", "penalty-0.5": "#e0736d",
    "penalty-1": "#b3261e", "sspo-0": "#1b6ca8", "sspo-9": "#17a398", "no-discount": "#9aa0a6", "pairs": "#7b4fa3",
    "whole-pairs": "#d17bd1",
}  # fmt: skip
_MARKERS = {"start": "s", "-zero": "v", "-shuffled": "x", "-likelihood": "P"}


def write_report(folder: Path) -> str:
    """Writes RESULTS.md and the pictures; returns the report."""
    tasks: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((folder / "runs").glob("*.json")):
        run = json.loads(file.read_text())
        tasks[run["family"], run["language"]][run["arm"]].append(run)
    some = next((r for arms in tasks.values() for runs in arms.values() for r in runs if r["updates"]), None)
    parts = [
        "# Compression",
        "\n\n".join(f"`{command}`" for command in commands(tasks)),
        "Tiny Llamas (233k weights) that imitated a wordy teacher, then trained by each arm from the same start: "
        f"{some['updates'] if some else 0} updates of 24 problems x 8 samples, learning rate 5e-4, one thread. The "
        "reward is 1 for the right answer and 0 else; only the arms called length penalty see length. Accuracy ± 1.96 "
        f"standard errors over {some['held_out'] if some else 0} held-out problems (each problem's mean over seeds), "
        "with every seed in brackets; tokens and steps of a solution; skipped: needed steps that it "
        "leaves out; drawn: tokens sampled in training; s: training seconds, of a run beside another, not a "
        "measurement of speed.",
        "How to read it. SSPO against outcome only: what the step signal adds at equal updates. Against the length "
        "penalty: whether a penalty on tokens would have done. V = 0 at lambda 0: the discount without values; V "
        "shuffled: values at their level without their content. What SSPO does and these two do not is due to the "
        "values. At lambda 0.9 the discount reaches back from the outcome by itself, so there V = 0 is the arm to "
        "compare with before anything is said of the values.",
        f"{_cpu()}, torch {torch.__version__}.",
    ]
    parts += ["## What SSPO adds", verdicts(tasks)]
    if pairs := pair_verdicts(tasks):
        of_states, of_solutions = (ARMS[name].pair_form for name in ("pairs", "whole-pairs"))
        parts += [
            "## What step pairs add",
            f"Their arms train by rounds, {of_states.rounds} of them, each on what the policy then samples: a solution "
            f"to each of {of_states.problems} problems, candidates for the next step at two states of each, and what "
            f"follows them (whole solutions: {of_solutions.solutions} to each of {of_solutions.problems}). They draw "
            "more tokens than SSPO's updates, see the table of the task. Signs as above.",
            pairs,
        ]
    for (family, language), arms in sorted(tasks.items()):
        parts += [f"## {family}, {language}", _table(arms), f"![{family}, {language}]({family}-{language}.png)"]
        _draw(arms, folder / f"{family}-{language}.png", f"{family}, {language}")
    text = "\n\n".join(parts) + "\n"
    (folder / "RESULTS.md").write_text(text)
    return text


def commands(tasks: Mapping[tuple[str, str], Mapping[str, list[dict]]]) -> list[str]:
    """What makes all these runs, and no others."""
    # by arm: the families, languages and seeds it was run for, languages with the same families and seeds together
    arms: dict[tuple, list[str]] = defaultdict(list)
    for arm in ARMS:
        families = defaultdict(lambda: defaultdict(list))
        for (family, language), runs in tasks.items():
            if arm in runs:
                # a start model is measured once, whatever the number of seeds
                seeds = max(len(r) for r in (runs.values() if not ARMS[arm].trains else [runs[arm]]))
                families[language][seeds].append(family)
        alike = defaultdict(list)
        for language, by_seeds in sorted(families.items()):
            for seeds, names in by_seeds.items():
                alike[tuple(sorted(names)), seeds].append(language)
        for (names, seeds), languages in alike.items():
            arms[names, tuple(languages), seeds].append(arm)
    return [
        f"python -m benchmarks compression --families {' '.join(names)} --languages {' '.join(languages)} "
        f"--seeds {seeds} --arms {' '.join(which)}"
        for (names, languages, seeds), which in arms.items()
    ]


def _table(arms: dict[str, list[dict]]) -> str:
    best = best_penalty(arms)
    lines = [HEADER]
    for name, arm in ARMS.items():
        if name not in arms:
            continue
        runs = arms[name]
        mark = " (the best of those run)" if name == best and sum(p in arms for p in _PENALTIES) > 1 else ""
        cells = [arm.text + mark, str(len(runs))]
        for how in ("greedy", "sampled"):
            cells.append(_accuracy([run[how]["correct"] for run in runs]))
            cells += [f"{_mean(runs, how, key):.{digits}f}" for key, digits in
                      (("tokens", 1), ("steps", 2), ("skipped", 3))]  # fmt: skip
        cells.append(f"{sum(run['sampled_tokens'] for run in runs) / len(runs) / 1000:.0f}k")
        cells.append(f"{sum(run['seconds'] for run in runs) / len(runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_penalty(arms: dict[str, list[dict]]) -> str | None:
    """The weight with the highest greedy accuracy, chosen on the very problems that are reported: in its favour."""
    there = [name for name in _PENALTIES if name in arms]
    return max(there, key=lambda name: _mean(arms[name], "greedy", "correct"), default=None)


def _mean(runs: list[dict], how: str, key: str) -> float:
    values = [value for run in runs for value in run[how][key]]
    return sum(values) / len(values)


def _accuracy(seeds: list[list[int]]) -> str:
    problems = [sum(column) / len(seeds) for column in zip(*seeds, strict=True)]
    n = len(problems)
    mean = sum(problems) / n
    error = math.sqrt(sum((x - mean) ** 2 for x in problems) / max(n - 1, 1) / n)
    each = [sum(seed) / n for seed in seeds]
    spread = f" [{', '.join(f'{x:.3f}' for x in each)}]" if len(seeds) > 1 else ""
    return f"{mean:.3f} ± {1.96 * error:.3f}{spread}"


def _draw(arms: dict[str, list[dict]], path: Path, title: str) -> None:
    """Accuracy against tokens: a square for a start model, a mark for every run."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), dpi=110, layout="constrained", sharey=True)
    for axis, how in zip(axes, ("greedy", "sampled"), strict=True):
        shown = [(name, arm) for name, arm in ARMS.items() if name in arms]
        for name, arm in shown:
            # a control has the colour of what it controls
            parent = max((p for p in _COLOURS if name.startswith(p)), key=len)
            x = [_mean([run], how, "tokens") for run in arms[name]]
            y = [_mean([run], how, "correct") for run in arms[name]]
            text = f"{ARMS[parent].text} {arm.text}" if arm.text.startswith("...") else arm.text
            marker = next((m for end, m in _MARKERS.items() if name.endswith(end)), "o")
            axis.scatter(x, y, s=46, color=_COLOURS[parent], label=text, alpha=0.85, marker=marker)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{title}: {how}", loc="left")
        axis.set(xlabel="tokens of a solution", ylim=(-0.03, 1.03))
        axis.set_xlim(left=0)
    axes[0].set_ylabel("right answers, held-out problems")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    plt.close(figure)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
