# SPDX-License-Identifier: Apache-2.0
"""Writes RESULTS.md and the pictures from the table of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.compression.pictures import draw
from benchmarks.compression.verdicts import accuracy, difference, of_seeds, total
from sspo_ext.signals.probing.budget import BudgetCurve
from sspo_ext.tracing.budgets import draw_budget_curves
from sspo_ext.tracing.picture import draw_chain

from .arms import ARMS

TABLE = "real_rl.jsonl"

KEY = ("name", "data", "arm", "seed")

AIM = 0.3  # SSPO's solutions are to be shorter than the start model's by this share

_COLUMNS = (
    "arm", "seeds", "updates", "accuracy, greedy", "tokens", "steps", "skipped", "accuracy, sampled", "tokens", "steps",
    "skipped", "area", "drawn", "CPU s",
)  # fmt: skip

HEADER = f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|"

Arms = Mapping[str, list[dict]]  # the runs of each arm, by seed


def read_runs(folder: Path) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """The runs of each model and data: for each arm those with the most updates, by seed."""
    tasks: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for run in records.read(folder / TABLE):
        tasks.setdefault((run["name"], run["data"]), {}).setdefault(run["arm"], []).append(run)
    return tasks


def write_report(folder: Path) -> str:
    """Writes RESULTS.md and the pictures from the folder's table of runs. Returns the report."""
    tasks = read_runs(folder)
    parts = ["# SSPO on a real language model", HOW]
    for (name, data), arms in sorted(tasks.items()):
        parts += section(name, data, arms, folder)
    text = records.with_notes("\n\n".join(parts) + "\n", folder)
    (folder / "RESULTS.md").write_text(text, encoding="utf-8")
    return text


HOW = (
    "Every arm trains an adapter from the same start model, with equal updates and samples. The reward is 1 for a "
    "right answer and 0 otherwise; only the arms called length penalty see the length. Accuracy ± 1.96 standard errors "
    "is over held-out problems (each problem's mean over seeds), with every seed in brackets. Skipped: needed steps "
    "that a solution leaves out. Area: the mean accuracy if the answer is demanded early, over budgets from no token "
    "to 80 % of the maximal length. Drawn: tokens sampled in training. CPU s: processor seconds of training on a "
    "machine that also ran other jobs."
)


def section(name: str, data: str, arms: Arms, folder: Path) -> list[str]:
    """The parts of the report on one model and one kind of problems."""
    some = next(iter(arms.values()))[0]
    trained = next((runs[0] for arm, runs in arms.items() if ARMS[arm].trains), some)
    stem = f"{name}-{data}"
    shown = trained["settings"]
    size = len(some["greedy"]["correct"])
    commands = dict.fromkeys(run["command"] for runs in arms.values() for run in runs)
    parts = [
        f"## {name}, {data}",
        "\n\n".join(f"`{command}`" for command in commands),
        f"{trained['updates']} updates of {shown['prompts']} problems x {shown['num_generations']} samples, learning "
        f"rate {shown['lr']:g}, LoRA of rank {shown['lora_r']} on the upper {shown['lora_share']:.0%} of the layers, "
        f"probe `{some['probe']}`; {size} held-out problems. {some['hardware']['cpu']}, {shown['device']}, "
        f"{shown['threads']} threads a run, torch {some['hardware']['torch']}.",
        missing(arms),
        table(arms),
        "### Verdict",
        verdict(arms),
    ]
    if tables := [run["probe_table"] for runs in arms.values() for run in runs if run.get("probe_table")]:
        parts += ["### Which probe makes the model answer", tables[0]]
    if len(groups := sorted(set(some["groups"]))) > 1:
        parts += ["### By language", by_group(arms, groups)]
    draw(arms, folder / f"{stem}.png", name, ARMS)
    parts += [f"![accuracy against tokens]({stem}.png)"]
    curves = {ARMS[arm].text.replace("... ", "SSPO, "): BudgetCurve.from_dict(arms[arm][0]["budget"]) for arm in BUDGETS
              if arm in arms and arms[arm][0]["budget"]}  # fmt: skip
    if curves:
        draw_budget_curves(curves, folder / f"{stem}-budgets.png")
        parts += ["### Answers demanded early", f"![budget curves]({stem}-budgets.png)"]
    return [*parts, *pictures(arms, groups, folder, stem)]


BUDGETS = ("start", "rloo", "sspo-0", "sspo-0-shuffled")


def missing(arms: Arms) -> str:
    """Says which arms and seeds are not there yet."""
    most = max((len(runs) for runs in arms.values()), default=0)
    text = {name: arm.text.removeprefix("... ") for name, arm in ARMS.items()}
    lacking = [text[name] for name in ARMS if name not in arms]
    fewer = [f"{text[n]} ({len(r)})" for n, r in arms.items() if ARMS[n].trains and len(r) < most]
    told = [f"Arms that were not run: {'; '.join(lacking)}."] if lacking else []
    told += [f"Arms with fewer than {most} seeds: {'; '.join(fewer)}."] if fewer else []
    return " ".join(["**This table is partial.**", *told]) if told else "Every arm was run."


def table(arms: Arms) -> str:
    """A line for each arm."""
    lines = [HEADER]
    for name, arm in ARMS.items():
        if name not in arms:
            continue
        runs = arms[name]
        cells = [arm.text, str(len(runs)), " ".join(dict.fromkeys(str(run["updates"]) for run in runs))]
        for how in ("greedy", "sampled"):
            mean, error = accuracy(runs, how)
            each = ", ".join(f"{accuracy([run], how)[0]:.3f}" for run in runs)
            cells.append(f"{mean:.3f} ± {error:.3f}" + f" [{each}]" * (len(runs) > 1))
            cells += [f"{total(runs, how, key):.{n}f}" for key, n in (("tokens", 1), ("steps", 2), ("skipped", 3))]
        areas = [run["budget"]["area"] for run in runs if run["budget"]]
        cells.append(f"{sum(areas) / len(areas):.3f}" if areas else "-")
        cells.append(f"{sum(run['sampled_tokens'] for run in runs) / len(runs) / 1000:.0f}k")
        cells.append(f"{sum(run['cpu_seconds'] for run in runs) / len(runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(arms: Arms) -> str:
    """Whether SSPO is 30 % shorter than the start model at RLOO's accuracy, and what the controls say."""
    ours = [name for name in ("sspo-0", "sspo-9") if name in arms]
    if not ours or "start" not in arms:
        return "There is no run of SSPO and of the start model yet."
    lines = [
        "| arm | how | tokens less the start's | less RLOO's | accuracy less RLOO's | less shuffled V's "
        "| skipped less the start's | the aim |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    ]
    for name in ours:
        for how in ("greedy", "sampled"):
            tokens = {arm: total(arms[arm], how, "tokens") for arm in (name, "start", "rloo") if arm in arms}
            change = tokens[name] / tokens["start"] - 1
            cells = [ARMS[name].text, how, f"{change:+.1%}"]
            cells.append(f"{tokens[name] / tokens['rloo'] - 1:+.1%}" if "rloo" in tokens else "-")
            cells += [told(arms, name, other, how, key) for other, key in
                      (("rloo", "correct"), (f"{name}-shuffled", "correct"), ("start", "skipped"))]  # fmt: skip
            lines.append("| " + " | ".join([*cells, reached(arms, name, how, change)]) + " |")
    return "\n".join([
        *lines, "",
        f"The aim: solutions at least {AIM:.0%} shorter than the start model's, at an accuracy that is not below "
        "RLOO's by more than the interval. A difference is taken problem by problem, from each problem's mean over the "
        "seeds; ± 1.96 standard errors over problems, each seed's difference in brackets. These errors leave out that "
        "other seeds would give other results.",
    ])  # fmt: skip


def reached(arms: Arms, name: str, how: str, change: float) -> str:
    """Whether the aim is reached, in words."""
    if "rloo" not in arms:
        return "open: RLOO was not run"
    gap, error, _ = difference(arms[name], arms["rloo"], how, "correct")
    short, right = change <= -AIM, gap >= -error
    if short and right:
        return "**reached**"
    return "not reached: " + " and ".join(
        ["not short enough"] * (not short) + ["less accurate than RLOO"] * (not right)
    )


def told(arms: Arms, name: str, other: str, how: str, key: str) -> str:
    """A difference with its error, or a dash."""
    if other not in arms:
        return "-"
    mean, error, _ = difference(arms[name], arms[other], how, key)
    each = ", ".join(f"{gap:+.3f}" for gap in of_seeds(arms[name], arms[other], how, key))
    return f"{mean:+.3f} ± {error:.3f} [{each}]"


def by_group(arms: Arms, groups: Sequence[str]) -> str:
    """Accuracy and tokens of each language."""
    lines = [
        "| arm | " + " | ".join(f"{g}: accuracy, greedy | tokens | accuracy, sampled | tokens" for g in groups) + " |"
    ]
    lines.append("| --- " * (1 + 4 * len(groups)) + "|")
    for name in ARMS:
        if name in arms:
            cells = [ARMS[name].text]
            for group in groups:
                runs = [of_group(run, group) for run in arms[name]]
                for how in ("greedy", "sampled"):
                    mean, error = accuracy(runs, how)
                    cells += [f"{mean:.3f} ± {error:.3f}", f"{total(runs, how, 'tokens'):.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_group(run: dict, group: str) -> dict[str, Any]:
    """The run on the problems of one group."""
    which = [i for i, g in enumerate(run["groups"]) if g == group]
    return {how: {key: [values[i] for i in which] for key, values in run[how].items()} for how in ("greedy", "sampled")}


def pictures(arms: Arms, groups: Sequence[str], folder: Path, stem: str) -> list[str]:
    """One chain of each group before and after, coloured by what each step gained."""
    if "start" not in arms or "sspo-0" not in arms:
        return []
    before, after = arms["start"][0], arms["sspo-0"][0]
    parts = [
        "### Before and after",
        f"Of the first {len(before['chains'])} held-out problems, those that both models solve greedily; of these the "
        "one in each language whose number of steps changes by the median. A step's number is its advantage. The "
        "curve is the value after each step: how sure the model is of the right answer. It ends at the reward.",
    ]
    for group in groups:
        pairs = [
            (a, b)
            for a, b, g in zip(before["chains"], after["chains"], before["groups"], strict=False)
            if g == group and a["reward"] == b["reward"] == 1
        ]
        if not pairs:
            continue
        pairs.sort(key=lambda pair: len(pair[0]["steps"]) - len(pair[1]["steps"]))
        for when, row in zip(("before", "after"), pairs[len(pairs) // 2], strict=True):
            row = {**row, "values": [*row["values"][:-1], row["reward"]]}  # nothing is asked after the end
            draw_chain(row, folder / f"{stem}-{group}-{when}.png", title=f"{when}: {len(row['steps'])} steps")
            parts.append(f"![{group}, {when}]({stem}-{group}-{when}.png)")
    return parts if len(parts) > 2 else []
