# SPDX-License-Identifier: Apache-2.0
"""Does SSPO make reasoning short and keep it right? Which part of SSPO does that?

    python -m benchmarks compression            # sums in English, the decisive arms, two seeds: 13 minutes
    python -m benchmarks compression --full     # three families, two languages, every arm, three seeds: hours

The 13 minutes were measured on two Xeon cores that also ran other jobs. The hours of the second command stand in
results/compression.

Tiny models first imitate a wordy teacher (`sspo_ext.demo.tasks`). Every arm then trains from the same start model, with
the same number of updates and samples. The reward is 1 for a right answer and 0 otherwise. Only the arms called "length
penalty" see the length. Every run is a process with one thread and leaves a JSON file in OUTPUT/runs. The files are
moved into the table OUTPUT/runs.parquet, from which the report is made. Finished runs are not run again: the same
command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import jobs, records
from sspo_ext._help import DefaultsFormatter
from sspo_ext.demo.tasks import FAMILIES, LANGUAGES

from .arms import ARMS, DECISIVE
from .report import KEY, TABLE, write_report
from .worker import start_folder


@dataclass(frozen=True)
class Run:
    family: str
    language: str
    arm: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.family}-{self.language}-{self.arm}-{self.seed}"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    runs = [
        Run(family, language, arm, seed)
        for family in options.families
        for language in options.languages
        for seed in range(options.seeds)
        for arm in options.arms
        if ARMS[arm].trains or seed == 0
    ]
    output, work = Path(options.output), Path(options.work)
    (output / "runs").mkdir(parents=True, exist_ok=True)
    (work / "logs").mkdir(parents=True, exist_ok=True)
    records.collect(output / TABLE, output / "runs", KEY)
    done = set() if options.redo else {Run(*(row[name] for name in KEY)) for row in records.read(output / TABLE)}
    todo = [run for run in runs if run not in done]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are recorded already")
    starts = {
        Run(r.family, r.language, "make-start") for r in todo if not start_folder(work, r.family, r.language).is_dir()
    }
    execute(sorted(starts, key=lambda r: r.name), options, "start models", lambda run: 2200)

    def length(run: Run) -> int:
        arm = ARMS[run.arm]
        return arm.pair_form.rounds if arm.pair_form else options.updates * arm.trains

    execute(todo, options, "runs", length)
    records.collect(output / TABLE, output / "runs", KEY)
    print(write_report(output))


def execute(runs: list[Run], options: argparse.Namespace, title: str, length: Callable[[Run], int]) -> None:
    """Executes the runs, `--jobs` at a time, each in its own process with one thread."""
    made = [jobs.Job(run.name, tuple(command(run, options)), length(run)) for run in runs]
    jobs.execute(made, Path(options.work) / "logs", title, options.jobs, _last_line)


def command(run: Run, options: argparse.Namespace) -> list[str]:
    output = Path(options.output) / "runs" / f"{run.name}.json"
    return [
        sys.executable, "-m", "benchmarks.compression.worker", "--family", run.family, "--language", run.language,
        "--arm", run.arm, "--seed", str(run.seed), "--updates", str(options.updates), "--held-out",
        str(options.held_out), "--work", options.work, "--output", str(output),
    ]  # fmt: skip


def _last_line(log: Path) -> tuple[int, str]:
    """(updates done, what to show) from the last line of a worker's log, which may be the imitation's progress bar."""
    text = log.read_text(errors="replace").replace("\r", "\n").strip().rpartition("\n")[2]
    words = text.split()
    if len(words) == 3 and words[0].isdigit():
        return int(words[0]), f"accuracy {words[1]} tokens {words[2]}"
    if "/2200 [" in text:
        return int(text.partition("/2200 [")[0].split()[-1].split("|")[-1]), ""
    return 0, ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compression", description=__doc__ and __doc__.splitlines()[0],
        formatter_class=DefaultsFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--full", action="store_true", help="every family, language and arm, three seeds")
    add("--families", nargs="+", choices=FAMILIES, help="(default: sums)")
    add("--languages", nargs="+", choices=LANGUAGES, help="(default: en)")
    add("--arms", nargs="+", choices=ARMS, help=f"(default: {' '.join(DECISIVE)})")
    add("--seeds", type=int, help="(default: 2)")
    add("--updates", type=int, default=40, help="of 24 problems x 8 samples")
    add("--held-out", type=int, default=400, help="problems that no arm trains on")
    add("--jobs", type=int, default=2, help="processes at once, one thread each")
    add("--redo", action="store_true", help="also run what is recorded already")
    add("--output", default="benchmarks/results/compression", help="table of runs, RESULTS.md, pictures")
    add("--work", default="build/compression", help="start models and logs")
    options = parser.parse_args(argv)
    every = (FAMILIES, LANGUAGES, tuple(ARMS), 3)
    few = (("sums",), ("en",), DECISIVE, 2)
    for name, value in zip(("families", "languages", "arms", "seeds"), every if options.full else few, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
