# SPDX-License-Identifier: Apache-2.0
"""A measured table: its rows, how they were measured, its record on disk and its Markdown."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import records

from . import measure, peers
from .measure import Spread

RESULTS = Path(__file__).parents[1] / "results"
FILE = "tables.jsonl"  # one table a line


@dataclass
class Table:
    name: str
    title: str
    columns: list[str]
    rows: list[list] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    load: list[float] = field(default_factory=list)  # one-minute load average before and after
    when: str = ""
    seconds: float = 0.0

    def note_rounds(self, times: dict[str, list[float]]) -> None:
        count = max(len(values) for values in times.values())
        self.rounds = min(self.rounds, count) if self.rounds else count
        single = [name for name, values in times.items() if len(values) < count]
        if single:
            self.notes.append(f"* One run only, for its length: {', '.join(single)}.")

    def save(self, folder: Path) -> None:
        records.add(folder / FILE, [asdict(self)], ("name",))

    @classmethod
    def load_all(cls, folder: Path) -> dict[str, Table]:
        return {row["name"]: cls(**row) for row in records.read(folder / FILE)}

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", f"`{self.command}`", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(show(cell) for cell in row) + " |" for row in self.rows]
        rounds = f"medians of {self.rounds} interleaved rounds; " if self.rounds else ""
        load = " -> ".join(f"{x:.1f}" for x in self.load)
        lines += ["", f"{rounds}{self.when}, load average {load}, {self.seconds:.0f} s."]
        return "\n".join(lines + [f"{note}" for note in self.notes]) + "\n"


def show(cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return "" if cell is None else str(cell)


def ms(values: list[float]) -> tuple[float, str]:
    """(median, "first quartile-third quartile") in milliseconds."""
    spread = Spread.of([1e3 * v for v in values])
    digits = 0 if spread.median >= 10 else 2
    return round(spread.median, 2), f"{spread.low:.{digits}f}-{spread.high:.{digits}f}"


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


@dataclass(frozen=True)
class Settings:
    quick: bool
    rounds: int | None
    limit_s: float  # a table stops adding rounds after this

    def size(self, real: int, small: int) -> int:
        return small if self.quick else real

    def count(self, rounds: int) -> int:
        return self.rounds or (3 if self.quick else rounds)


def run(
    tables: dict[str, Callable[[Settings], Table]],
    argv: list[str],
    doc: str | None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """The command line of a module that measures tables.

    Args:
        tables: name -> function that measures the table. Tables on disk are not measured again.
        argv: the arguments of the command line.
        doc: the module's docstring. Its first line describes the command.
        finish: is called with the results folder after each table, and at the end.
    """
    parser = argparse.ArgumentParser(prog=os.path.basename(sys.argv[0]), description=doc and doc.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(tables), metavar="TABLE", help=f"only these, of {', '.join(tables)}"
    )
    parser.add_argument("--redo", action="store_true", help="measure again what is already in the results folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the code runs")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: each table's own)")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a table starts no further round")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for a load below 1.5 before each table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PEER", help="peers to leave out, by part of their name"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread, for a busy machine"
    )
    options = parser.parse_args(argv)
    if options.clock == "cpu":
        options.threads, measure.clock = 1, time.thread_time
    peers.left_out.update(options.without)
    torch.set_num_threads(options.threads)
    settings = Settings(options.quick, options.rounds, options.limit)
    for name in options.only or tables:
        label = f"{name}-cpu" if options.clock == "cpu" else name
        if label in Table.load_all(options.out) and not options.redo:
            continue
        load, started = measure.settle(wait_s=options.wait), time.perf_counter()
        print(f"{name}: measuring, load {load:.1f}", file=sys.stderr, flush=True)
        table = tables[name](settings)
        table.name, table.load = label, [load, os.getloadavg()[0]]
        table.seconds, table.machine = time.perf_counter() - started, measure.machine()
        table.when = time.strftime("%Y-%m-%d %H:%M")
        limit = "" if options.limit == parser.get_default("limit") else f" --limit {options.limit:g}"
        quick = " --quick" if options.quick else ""
        clock = " --clock cpu" if options.clock == "cpu" else ""
        without = f" --without {' '.join(map(repr, options.without))}" if options.without else ""
        table.command = f"python -m benchmarks report --only {name} --redo --threads {options.threads}"
        table.command += limit + quick + without + clock
        if clock:
            table.title += " (processor time of one thread)"
        table.save(options.out)
        print(table.markdown(), flush=True)
        finish(options.out)
    finish(options.out)
