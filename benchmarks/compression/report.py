"""From the table of runs to RESULTS.md and a picture for each task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from benchmarks import records

from .arms import ARMS
from .pictures import draw
from .verdicts import accuracy, over_seeds, pair_verdicts, total, verdicts

TABLE = "runs.parquet"
KEY = ("family", "language", "arm", "seed")
_PENALTIES = [name for name in ARMS if name.startswith("penalty")]

HEADER = (
    "| arm | seeds | accuracy, greedy | tokens | steps | skipped | accuracy, sampled | tokens | steps | skipped "
    "| drawn | s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def read_runs(folder: Path) -> dict[tuple[str, str], dict[str, list[dict]]]:
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


def report(tasks: Mapping[tuple[str, str], Mapping[str, list[dict]]]) -> str:
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
        f"{machines(tasks)}. {spent(tasks)}",
    ]
    parts += ["## What SSPO adds", verdicts(tasks), "## Over seeds", over_seeds(tasks)]
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
    return "\n\n".join(parts) + "\n"


def machines(tasks: Mapping[tuple[str, str], Mapping[str, list[dict]]]) -> str:
    """Where the runs were made, whichever machine makes the report."""
    runs = (run for arms in tasks.values() for some in arms.values() for run in some)
    return "; ".join(sorted({run.get("machine") or "A machine that was not recorded" for run in runs}))


def spent(tasks: Mapping[tuple[str, str], Mapping[str, list[dict]]]) -> str:
    """The hours that training took."""
    runs = [run for arms in tasks.values() for some in arms.values() for run in some]
    hours = sum(run["seconds"] for run in runs) / 3600
    return (
        f"Training took {hours:.1f} hours summed over the {len(runs)} runs, so about {hours / 2:.1f} two side by side, "
        "as they were run; other jobs were on the machine. Start models and held-out problems are not in it."
    )


def commands(tasks: Mapping[tuple[str, str], Mapping[str, list[dict]]]) -> list[str]:
    """The commands that make these runs and no others."""
    # Of each arm the families, languages and seeds. Languages with the same families and seeds share a command.
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
            cells.append(_accuracy(runs, how))
            cells += [f"{total(runs, how, key):.{digits}f}" for key, digits in
                      (("tokens", 1), ("steps", 2), ("skipped", 3))]  # fmt: skip
        cells.append(f"{sum(run['sampled_tokens'] for run in runs) / len(runs) / 1000:.0f}k")
        cells.append(f"{sum(run['seconds'] for run in runs) / len(runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_penalty(arms: dict[str, list[dict]]) -> str | None:
    """The weight with the highest greedy accuracy. It is chosen on the reported problems, which favours it."""
    there = [name for name in _PENALTIES if name in arms]
    return max(there, key=lambda name: total(arms[name], "greedy", "correct"), default=None)


def _accuracy(runs: list[dict], how: str) -> str:
    mean, error = accuracy(runs, how)
    each = [accuracy([run], how)[0] for run in runs]
    spread = f" [{', '.join(f'{x:.3f}' for x in each)}]" if len(runs) > 1 else ""
    return f"{mean:.3f} ± {error:.3f}{spread}"
