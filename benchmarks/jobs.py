# SPDX-License-Identifier: Apache-2.0
"""Runs that are processes of their own, a few at a time, under one progress bar."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

# For glibc, others ignore it. By default it gives large blocks back to the system, which hands out zeroed pages anew at
# every update.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


@dataclass(frozen=True)
class Job:
    """A process.

    Attributes:
        name: Of the process and its log.
        command: What is run.
        length: Its updates, for the bar.
    """

    name: str
    command: tuple[str, ...]
    length: int


def execute(
    jobs: Sequence[Job],
    logs: Path,
    title: str,
    at_once: int,
    reached: Callable[[Path], tuple[int, str]],
    threads: int = 1,
    finished: Callable[[], None] | None = None,
) -> None:
    """Executes the jobs, `at_once` at a time. Stops at the first that fails.

    Args:
        jobs: What to execute.
        logs: The folder of their logs.
        title: Of the progress bar.
        at_once: Processes at once.
        reached: reached(log) -> (updates done, what to show).
        threads: Of each process.
        finished: Called after each process that succeeds.
    """
    waiting: list[Job] = list(jobs)
    going: dict[Job, tuple[subprocess.Popen, Path]] = {}
    count = str(threads)
    environment = {
        **KEEP_FREED_MEMORY, **os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    often = 0.5 if sys.stderr.isatty() else 60  # seconds; a log gets a line a minute
    total = sum(job.length for job in jobs)
    # a command that is killed must not leave runs behind, which its successor would start a second time
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tqdm(
            total=total, desc=title, unit="update", disable=not jobs, mininterval=often, maxinterval=often
        ) as bar:
            done = 0
            while waiting or going:
                while waiting and len(going) < at_once:
                    job = waiting.pop(0)
                    log = logs / f"{job.name}.log"
                    with log.open("w") as file:
                        process = subprocess.Popen(job.command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                    going[job] = process, log
                time.sleep(0.5)
                now, notes = done, []
                for job, (process, log) in list(going.items()):
                    last = reached(log)
                    now += last[0]
                    notes.append(f"{job.name} {last[1]}")
                    if process.poll() is None:
                        continue
                    del going[job]
                    if process.returncode:
                        raise SystemExit(f"{job.name} failed ({process.returncode}):\n{log.read_text()[-3000:]}")
                    done += job.length
                    tqdm.write(f"{job.name} done {last[1]}")
                    if finished is not None:
                        finished()
                bar.set_postfix_str("; ".join(notes), refresh=False)
                bar.update(min(max(now, bar.n), total) - bar.n)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _ in going.values():
            process.terminate()
