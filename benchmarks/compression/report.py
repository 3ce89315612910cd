# SPDX-License-Identifier: Apache-2.0
"""Writes RESULTS.md and a plot of each task from the table of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from benchmarks import records

from .arms import ARMS
from .pictures import draw
from .verdicts import Tasks, accuracy, over_seeds, pair_verdicts, total, verdicts

TABLE = "runs.parquet"
KEY = ("family", "language", "arm", "seed")
_PENALTIES = [name for name in ARMS if name.startswith("penalty")]

HEADER = (
    "| arm | seeds | accuracy, greedy | tokens | steps | skipped | accuracy, sampled | tokens | steps | skipped "
    "| drawn | s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def read_runs(folder: Path) -> Tasks:
    """The runs of each task and arm, by seed."""
    tasks: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in records.read(folder / TABLE):
        tasks[run["family"], run["language"]][run["arm"]].append(run)
    return tasks


def write_report(folder: Path) -> str:
    """Writes RESULTS.md and the pictures from the folder's table of runs; returns the report."""
    tasks = read_runs(folder)
    text = report(tasks)
    for (family, language), arms in sorted(tasks.items()):
        draw(arms, folder / f"{family}-{language}.png", f"{family}, {language}")
    (folder / "RESULTS.md").write_text(text, encoding="utf-8")
    return text


def report(tasks: Tasks) -> str:
    some = next((r for arms in tasks.values() for runs in arms.values() for r in runs if r["updates"]), None)
    parts = [
        "# Compression",
        "\n\n".join(f"`{command}`" for command in commands(tasks)),
        "Tiny Llamas (233k weights) imitated a wordy teacher. Each arm then trained from the same start: "
        f"{some['updates'] if some else 0} updates of 24 problems x 8 samples, learning rate 5e-4, one thread. The "
        "reward is 1 for a right answer and 0 otherwise. Only the arms called length penalty see the length.",
        f"Accuracy ± 1.96 standard errors is over {some['held_out'] if some else 0} held-out problems (each problem's "
        "mean over seeds), with every seed in brackets. Tokens and steps are those of a solution. Skipped: needed "
        "steps that a solution leaves out. Drawn: tokens sampled in training. s: seconds of training; two runs shared "
        "the machine, so they do not measure speed.",
        "How to read the comparisons. SSPO less outcome only shows what the step signal adds at equal updates. SSPO "
        "less a length penalty shows whether a penalty on tokens would do as well. V = 0 at lambda 0 has the discount "
        "without values. V shuffled has the same values in the wrong places. An effect of SSPO that these two arms "
        "lack comes from the values. At lambda 0.9 the discounted outcome reaches earlier steps even without values. "
        "There an effect comes from the values only if V = 0 lacks it.",
        f"{machines(tasks)}. {spent(tasks)}",
    ]
    parts += ["## What SSPO adds", verdicts(tasks), "## Over seeds", over_seeds(tasks)]
    if pairs := pair_verdicts(tasks):
        of_states, of_solutions = ARMS["pairs"].pair_form, ARMS["whole-pairs"].pair_form
        assert of_states is not None and of_solutions is not None
        parts += [
            "## What step pairs add",
            f"These arms train in {of_states.rounds} rounds. In each round the policy samples a solution to each of "
            f"{of_states.problems} problems, candidates for the next step at two states of each solution, and a "
            f"continuation of each candidate. For whole solutions it samples {of_solutions.solutions} solutions to "
            f"each of {of_solutions.problems} problems. They draw more tokens than SSPO's updates: see the table of "
            "the task. Bold and italic as above.",
            pairs,
        ]
    for (family, language), arms in sorted(tasks.items()):
        parts += [f"## {family}, {language}", _table(arms), f"![{family}, {language}]({family}-{language}.png)"]
    return "\n\n".join(parts) + "\n"


def machines(tasks: Tasks) -> str:
    """The machines that the runs were made on."""
    runs = (run for arms in tasks.values() for some in arms.values() for run in some)
    return "; ".join(sorted({run.get("machine") or "A machine that was not recorded" for run in runs}))


def spent(tasks: Tasks) -> str:
    """The hours that training took."""
    runs = [run for arms in tasks.values() for some in arms.values() for run in some]
    hours = sum(run["seconds"] for run in runs) / 3600
    return (
        f"Training took {hours:.1f} hours summed over the {len(runs)} runs, so about {hours / 2:.1f} two side by side, "
        "as they were run. The machine also ran other jobs. Start models and held-out problems are not counted."
    )


def commands(tasks: Tasks) -> list[str]:
    """The commands that make these runs and no others."""
    # Arms with the same families, languages and seeds share a command, and so do languages with the same families.
    arms: dict[tuple, list[str]] = defaultdict(list)
    for arm in ARMS:
        families = defaultdict(lambda: defaultdict(list))
        for (family, language), runs in tasks.items():
            if arm in runs:
                # A start model has one run, whatever the number of seeds.
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


def _table(arms: Mapping[str, list[dict]]) -> str:
    best = best_penalty(arms)
    lines = [HEADER]
    for name, arm in ARMS.items():
        if name not in arms:
            continue
        runs = arms[name]
        mark = " (the best of those run)" if name == best and sum(p in arms for p in _PENALTIES) > 1 else ""
        cells = [arm.text + mark, str(len(runs))]
        for how in ("greedy", "sampled"):
            cells.append(_accuracy(runs, how))
            cells += [f"{total(runs, how, key):.{digits}f}" for key, digits in
                      (("tokens", 1), ("steps", 2), ("skipped", 3))]  # fmt: skip
        cells.append(f"{sum(run['sampled_tokens'] for run in runs) / len(runs) / 1000:.0f}k")
        cells.append(f"{sum(run['seconds'] for run in runs) / len(runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_penalty(arms: Mapping[str, list[dict]]) -> str | None:
    """The length penalty with the highest greedy accuracy. The choice uses the reported problems, which favours it."""
    there = [name for name in _PENALTIES if name in arms]
    return max(there, key=lambda name: total(arms[name], "greedy", "correct"), default=None)


def _accuracy(runs: list[dict], how: str) -> str:
    mean, error = accuracy(runs, how)
    each = [accuracy([run], how)[0] for run in runs]
    spread = f" [{', '.join(f'{x:.3f}' for x in each)}]" if len(runs) > 1 else ""
    return f"{mean:.3f} ± {error:.3f}{spread}"
