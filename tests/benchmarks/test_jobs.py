# SPDX-License-Identifier: Apache-2.0
"""Jobs: a few processes at a time, and none left behind.

Mutations that turned a test red: all started at once; a failure passed over; `terminate` left out; the handler of
SIGTERM left out; `KEEP_FREED_MEMORY` left out, or after the user's own environment.
"""

import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

from benchmarks.jobs import Job, execute


def reached(log):
    return 1, log.read_text()


def test_a_few_at_a_time(tmp_path):
    """The third starts after one of the first two has ended."""
    code = "import time, sys, pathlib; p = pathlib.Path(sys.argv[1]); a = time.time(); time.sleep(0.3); p.write_text(f'{a} {time.time()}')"  # noqa: E501
    jobs = [Job(str(i), (sys.executable, "-c", code, str(tmp_path / f"{i}.txt")), 1) for i in range(3)]
    done = []
    execute(jobs, tmp_path, "some", 2, reached, finished=lambda: done.append(len(list(tmp_path.glob("*.txt")))))
    assert len(done) == 3 and done[0] < 3
    spans = [tuple(map(float, (tmp_path / f"{i}.txt").read_text().split())) for i in range(3)]
    assert spans[2][0] >= min(spans[0][1], spans[1][1])


def test_a_failure_ends_all(tmp_path):
    slow = Job("slow", (sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"), 1)
    bad = Job("bad", (sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit('no such model')"), 1)
    began = time.monotonic()
    with pytest.raises(SystemExit, match=r"bad failed \(1\):\nno such model"):
        execute([slow, bad], tmp_path, "some", 2, reached)
    assert time.monotonic() - began < 50


def test_environment(tmp_path, monkeypatch):
    """Two threads, freed memory kept, and what the user set stays."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    names = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    code = f"import os; print(*(os.environ[name] for name in {names!r}))"
    execute([Job("run", (sys.executable, "-c", code), 1)], tmp_path, "run", 1, reached, threads=2)
    assert (tmp_path / "run.log").read_text() == "2 7 0\n"


def test_a_killed_command_leaves_no_run(tmp_path):
    """The run writes its last file only if nobody ends it."""
    run = f"import time, os; os.chdir({str(tmp_path)!r}); open('on', 'w'); time.sleep(4); open('left', 'w')"
    parent = f"""
import sys
from pathlib import Path
from benchmarks.jobs import Job, execute
execute([Job("run", (sys.executable, "-c", {run!r}), 1)], Path({str(tmp_path)!r}), "run", 1, lambda log: (0, ""))
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    while not (tmp_path / "on").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    time.sleep(5)
    assert not (tmp_path / "left").exists()
