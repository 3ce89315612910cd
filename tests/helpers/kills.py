# SPDX-License-Identifier: Apache-2.0
"""Runs of `sspo-ext train` and `rl` that are killed (kill -9) and resumed, against the unbroken run.

`OMP_NUM_THREADS=1 PYTHONPATH=.:tests python -m helpers.kills both 20` kills each command at 20 random moments and
prints a table of how the resumed runs ended; `... both points` kills at fixed points instead. A run is a fork of this
process, which has imported everything, so that the moments fall on the work of a run and not on imports. One thread:
threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from helpers.rl import ROWS, make_model, make_tokenizer

_UPDATES, _SAVE = {"train": 40, "rl": 12}, {"train": 4, "rl": 2}
_COMMON = "--lr 1e-3 --optim adamw_torch --logging-steps 1 --no-disable-dropout".split()
_OWN = {
    "train": ["--batch-size", "2"],
    "rl": [*"--batch-size 4 --num-generations 4 --max-completion-length 8 --probe # --num-iterations 2".split(),
           *"--loss-type ppo --beta 0.01 --grader helpers.rl:reward".split()],
}  # fmt: skip


class Runs:
    """Runs of one command on a tiny model.

    Args:
        command: "train" or "rl".
        folder: Where models, data and outputs are written.
        more: More options of the command.
    """

    def __init__(self, command: str, folder: str | os.PathLike, *more: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        make_model(dropout=0.1).save_pretrained(self.folder / "model")
        make_tokenizer().save_pretrained(self.folder / "model")
        pairs = [
            {"prompt": row["prompt"], "chosen": f"a{n % 10}\n# {row['answer']}", "rejected": f"b{n % 10}+\n#{n % 10}"}
            for n, row in enumerate(ROWS)
        ]
        rows = pairs if command == "train" else ROWS
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.options = [command, "--model", str(self.folder / "model"), "--data", str(self.folder / "rows.jsonl")]
        self.options += ["--max-steps", str(_UPDATES[command]), "--save-steps", str(_SAVE[command])]
        self.options += [*_COMMON, *_OWN[command], *more]

    def start(self, name: str, *more: str, before: Callable[[], object] | None = None) -> int:
        """Forks a run with the output folder `name`, in which `before` is called first. Returns its process id."""
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            log = os.open(self.log(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            from tqdm import tqdm

            from sspo_ext.cli.main import main

            tqdm.set_lock(threading.RLock())  # its own is shared by all forks; one that is killed may hold it
            if before is not None:
                before()
            status = main([*self.options, "--output-dir", str(self.folder / name), *more])
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def run(self, name: str, *more: str, before: Callable[[], object] | None = None) -> int:
        """Runs to the end. Returns the exit status, -9 for a kill."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(name, *more, before=before), 0)[1])

    def killed(self, name: str, seconds: float, *more: str) -> int:
        """Kills a run after so many seconds. Returns -9, or its exit status if it had ended before."""
        pid = self.start(name, *more)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def log(self, name: str) -> Path:
        """What the last run with this output folder printed."""
        return self.folder / f"{name}.log"

    def resumed(self, name: str, whole: str) -> str:
        """Resumes until the end: "equal" to the run `whole`, "refused", or "other"."""
        status = self.run(name, *(["--resume"] if (self.folder / name).exists() else []))
        if status:
            return "refused" if status == 2 else "other"
        return "equal" if self.weights(name) == self.weights(whole) else "other"

    def weights(self, name: str) -> bytes:
        """The file of the trained model."""
        return (self.folder / name / "model.safetensors").read_bytes()


def kill_at(owner: Any, function: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """What makes a run kill itself before (or after) that call of a function of a class or module, counted from 1."""

    def patch() -> None:
        whole, count = getattr(owner, function), 0

        def dies(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = whole(*args, **kwargs)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, function, dies)

    return patch


def _points(command: str) -> dict[str, Callable[[], None]]:
    """Moments of a run at which something is half done, and what makes a run kill itself there."""
    from transformers import Trainer, TrainerState

    from sspo_ext.train import base, reference_cache
    from sspo_ext.train.base import StepTrainer

    early = {
        "before any update": kill_at(StepTrainer, "train", 1),
        "in the second update": kill_at(StepTrainer, "training_step", 2),
        "in an update between two checkpoints": kill_at(StepTrainer, "training_step", 6),
    }
    if command == "train":
        early |= {"while the reference is computed": kill_at(reference_cache, "_save", 1)}
    return early | {
        "before the first checkpoint": kill_at(StepTrainer, "_save_checkpoint", 1),
        "weights written, no optimizer": kill_at(Trainer, "_save_optimizer_and_scheduler", 2),
        "no random state": kill_at(Trainer, "_save_rng_state", 2),
        "no trainer state": kill_at(TrainerState, "save_to_json", 3),
        "all written, not named": kill_at(base, "put_in_place", 2),
        "just named": kill_at(base, "put_in_place", 2, after=True),
        "last checkpoint half written": kill_at(Trainer, "_save_rng_state", _UPDATES[command] // _SAVE[command]),
        "all updates done, model not saved": kill_at(StepTrainer, "save_result", 1),
        "model saved, not marked": kill_at(TrainerState, "save_to_json", _UPDATES[command] // _SAVE[command] + 1),
        "finished": kill_at(StepTrainer, "save_result", 1, after=True),
    }


def fixed_kills(command: str, folder: str) -> Counter:
    """How runs ended that were killed at `_points` and then resumed."""
    runs, found = Runs(command, folder), Counter()
    assert runs.run("whole") == 0, runs.log("whole").read_text()
    for number, (point, before) in enumerate(_points(command).items()):
        name = f"killed-{number}"
        status = runs.run(name, before=before)
        assert status == -signal.SIGKILL, f"{point}: ended with {status}"
        found[_report(runs, name, f"{command}, {point}")] += 1
    return found


def random_kills(command: str, folder: str, kills: int, seed: int) -> Counter:
    """How runs ended that were killed at random moments and then resumed."""
    runs, rng, found = Runs(command, folder), random.Random(f"{command}:{seed}"), Counter()
    began = time.monotonic()
    assert runs.run("whole") == 0, runs.log("whole").read_text()
    seconds, number = time.monotonic() - began, 0
    while found.total() < kills:
        name, moment, number = f"killed-{number}", rng.uniform(0, seconds), number + 1
        if runs.killed(name, moment) == -signal.SIGKILL:
            found[_report(runs, name, f"{command}, after {moment:.2f} of {seconds:.2f} s")] += 1
        else:  # it had ended: the machine is faster now
            seconds = moment
    return found


def _report(runs: Runs, name: str, what: str) -> str:
    """Resumes a killed run, prints what became of it, and returns that."""
    left = [path.name for path in (runs.folder / name).glob("*")]
    result = runs.resumed(name, "whole")
    last = "" if result == "equal" else runs.log(name).read_text(errors="replace").strip().splitlines()[-1:]
    print(f"{what}: {result}; found {' '.join(sorted(left)) or 'nothing'}", last, flush=True)
    return result


def main(commands: str, kills: str, seed: str = "0") -> int:
    """Kills "train", "rl" or "both" at "points" or so many random moments, and prints a table."""
    for module in ("cli.main", "data.tokenize", "train.preference_trainer", "train.sspo_trainer"):
        import_module(f"sspo_ext.{module}")  # before the forks
    lines = ["| command | kills | equal | refused | other |", "| --- | --- | --- | --- | --- |"]
    for command in _OWN if commands == "both" else [commands]:
        with tempfile.TemporaryDirectory() as folder:
            ends = (
                fixed_kills(command, folder)
                if kills == "points"
                else random_kills(command, folder, int(kills), int(seed))
            )
        lines.append(f"| {command} | {ends.total()} | {ends['equal']} | {ends['refused']} | {ends['other']} |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
