# SPDX-License-Identifier: Apache-2.0
"""Measures every table that is missing, then writes RESULTS.md and plots to benchmarks/results/.

    python -m benchmarks report [--only TABLE ...] [--redo] [--quick] [--wait 600]

Each table is saved as a line of tables.jsonl and not measured again. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import linear, logits, plots, tables
from .tables import Table

INTRODUCTION = """# Results

Made by `python -m benchmarks report`: every table names the command that makes it again. Contestants run interleaved in
one process, each once a round in shuffled order. Times are medians, ratios medians of per-round ratios; memory is the
rise of a fresh process's resident set. Before a clock starts, gradients are compared on a small problem.
"""


def write(folder: Path) -> None:
    """Writes RESULTS.md from the tables in the folder, in the order of `TABLES`, and the plots."""
    known = [label for name in (*logits.TABLES, *linear.TABLES) for label in (name, f"{name}-cpu")]
    stored = Table.load_all(folder)
    found = [stored[name] for name in known if name in stored]
    machines = []
    for table in found:
        if table.machine not in machines:
            machines.append(table.machine)
    parts = [INTRODUCTION]
    for number, machine in enumerate(machines, 1):
        lines = (f"* {key}: {value}" for key, value in machine.items())
        parts.append("\n".join([f"Machine {number}:\n", *lines]) + "\n")
    pictures = plots.draw(folder, {table.name: table for table in found})
    for table in found:
        parts.append(f"{table.markdown()}* Machine {machines.index(table.machine) + 1}.\n")
        parts += [f"![{table.title}]({name})\n" for name in pictures.get(table.name, [])]
    (folder / "RESULTS.md").write_text("\n".join(parts))


def main(argv: list[str]) -> None:
    tables.run({**logits.TABLES, **linear.TABLES}, argv, __doc__, finish=write)


if __name__ == "__main__":
    main(sys.argv[1:])
