# SPDX-License-Identifier: Apache-2.0
"""The demo on several seeds: what its one run cannot say.

    python -m benchmarks demo-seeds

Each seed is a whole `sspo-ext demo` with the demo's own settings. Its row goes into OUTPUT/demo.jsonl, from which the
report is made. Seeds that are recorded with these settings are not run again. The picture is that of the first seed.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import records
from sspo_ext._help import DefaultsFormatter
from sspo_ext.demo import DemoConfig, run
from sspo_ext.demo.claim import MARGIN, STAGES, Claim

from .verdicts import interval
from .worker import machine

TABLE = "demo.jsonl"

CELLS = (
    ("right answers, greedy", "greedy", "accuracy", "{:.1%}"),
    ("tokens, greedy", "greedy", "tokens", "{:.1f}"),
    ("right answers, sampled", "sampled", "accuracy", "{:.1%}"),
    ("tokens, sampled", "sampled", "tokens", "{:.1f}"),
    ("needed steps skipped, sampled", "sampled", "skipped", "{:.2f}"),
)

FIRST = 3  # seeds whose interval is shown beside that of all


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    output = Path(options.output)
    for seed in options.seeds:
        config = DemoConfig(seed=seed)
        if any(row["config"] == asdict(config) for row in records.read(output / TABLE)):
            print(f"seed {seed} is recorded already")
            continue
        began, folder = time.process_time(), Path(options.work) / f"seed-{seed}"
        result = run(folder, config)
        row = {name: result[name] for name in ("config", "claim", "stages")}
        seconds = round(time.process_time() - began)
        records.add(output / TABLE, [{"seed": seed, "machine": machine(), "cpu_seconds": seconds, **row}], ("seed",))
        if seed == min(row["seed"] for row in records.read(output / TABLE)):
            shutil.copy(folder / "demo.png", output / "demo.png")
    text = records.with_notes(report(records.read(output / TABLE)), output)
    (output / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks demo-seeds", description=__doc__ and __doc__.splitlines()[0],
        formatter_class=DefaultsFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds to run")
    add("--output", default="benchmarks/results/demo", help="table of runs, RESULTS.md, picture")
    add("--work", default="build/demo", help="what each run writes")
    return parser.parse_args(argv)


def over_seeds(rows: list[dict]) -> Claim:
    """The claim over seeds: Student's t, each seed one number."""
    return Claim(*(interval([row["claim"][name][0] for row in rows]) for name in ("shorter", "right")))


def report(rows: list[dict]) -> str:
    """The report of the recorded runs."""
    config, seeds = rows[0]["config"], [row["seed"] for row in rows]
    if any({**row["config"], "seed": 0} != {**config, "seed": 0} for row in rows):
        raise ValueError("rows: expected runs with the same settings, got several; remove the old ones")
    stages = list(rows[0]["stages"])
    lines = ["| mean [each seed] | " + " | ".join(STAGES[name] for name in stages) + " |"]
    lines.append("| --- |" + " --- |" * len(stages))
    for text, how, key, form in CELLS:
        cells = []
        for stage in stages:
            values = [row["stages"][stage][how][key] for row in rows]
            each = f" [{', '.join(map(form.format, values))}]" if stage != "start" or how == "sampled" else ""
            cells.append(form.format(sum(values) / len(values)) + each)
        lines.append(f"| {text} | {' | '.join(cells)} |")
    singles = ["| seed | fewer tokens | right answers, points | processor seconds |", "| --- | --- | --- | --- |"]
    for row in rows:
        (saved, saved_error), (gain, gain_error) = row["claim"]["shorter"], row["claim"]["right"]
        singles.append(
            f"| {row['seed']} | {100 * saved:.1f} ± {100 * saved_error:.1f} % "
            f"| {100 * gain:+.1f} ± {100 * gain_error:.1f} | {row['cpu_seconds']} |"
        )
    first = over_seeds(rows[:FIRST]).sentence(f"the first {FIRST} seeds, sampled,")
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    return "\n\n".join([
        "# The demo on several seeds",
        f"`python -m benchmarks demo-seeds --seeds {' '.join(map(str, seeds))}`",
        f"Each seed is one `sspo-ext demo`: {config['updates']} updates of {config['prompts']} problems x "
        f"{config['num_generations']} samples, learning rate {config['lr']:g} ({config['lr_scheduler_type']}), gamma "
        f"{config['gamma']:g}, lambda {config['lam']:g}; {config['held_out']} held-out problems, the same for all. "
        f"{machines}; on another machine a seed gives other numbers.",
        f"**{over_seeds(rows).sentence(f'these {len(rows)} seeds, sampled,')}** (95 % intervals of Student's t, each "
        f"seed one number). As often right means: with this confidence not more than {MARGIN:.0%} below."
        if len(rows) > 1 else "One seed has no interval over seeds.",
        *([f"{first}."] if len(rows) > FIRST else []),
        "\n".join(lines),
        "SSPO beside outcome only, seed by seed, sampled; ± 1.96 standard errors over the held-out problems:",
        "\n".join(singles),
        f"![the run with seed {min(seeds)}](demo.png)",
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
