# SPDX-License-Identifier: Apache-2.0
"""Runs that are processes of their own, a few at a time, under one progress bar."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm


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
) -> None:
    """Executes the jobs, `at_once` at a time. Stops at the first that fails.

    Args:
        jobs: What to execute.
        logs: The folder of their logs.
        title: Of the progress bar.
        at_once: Processes at once.
        reached: reached(log) -> (updates done, what to show).
        threads: Of each process.
    """
    waiting, going = list(jobs), {}
    count = str(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
    with tqdm(total=sum(job.length for job in jobs), desc=title, unit="update", disable=not jobs) as bar:
        done = 0
        while waiting or going:
            while waiting and len(going) < at_once:
                job = waiting.pop(0)
                log = logs / f"{job.name}.log"
                with log.open("w") as file:
                    going[job] = (
                        subprocess.Popen(job.command, stdout=file, stderr=subprocess.STDOUT, env=environment),
                        log,
                    )
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
                    for other, _ in going.values():
                        other.terminate()
                    raise SystemExit(f"{job.name} failed:\n{log.read_text()[-3000:]}")
                done += job.length
                tqdm.write(f"{job.name} done {last[1]}")
            bar.n = min(max(now, bar.n), bar.total)
            bar.set_postfix_str("; ".join(notes))
