# SPDX-License-Identifier: Apache-2.0
"""One run: one arm of one task with one seed, on one thread. It writes its JSON file at the end, as a whole."""

from __future__ import annotations

import argparse
import logging
import platform
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks import records
from sspo_ext.demo.arms import START, load_start, make_trainer, measure
from sspo_ext.demo.imitate import make_start_model
from sspo_ext.demo.tasks import Task
from sspo_ext.train.progress import curves

from .arms import ARMS
from .pairs import train_pairs


def start_folder(work: Path, family: str, language: str) -> Path:
    """The package's own start model, or one made in `work`."""
    return START if (family, language) == ("sums", "en") else work / "start" / f"{family}-{language}"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, torch {torch.__version__}"


class _Lines(TrainerCallback):
    """Prints a line after each update. The parent process counts them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "accuracy" in logs:
            print(f"{state.global_step} {logs['accuracy']:.3f} {logs['completions/mean_length']:.2f}", flush=True)


def run(options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    arm, task, work = ARMS[options.arm], Task(options.family, options.language), Path(options.work)
    model, tokenizer = load_start(start_folder(work, options.family, options.language))
    updates = options.updates if arm.trains else 1
    trainer = make_trainer(
        model, tokenizer, task, work / "trainer", updates=updates, seed=options.seed, reward=arm.reward(task),
        trainer_class=arm.trainer, callbacks=[_Lines()], **arm.options,
    )  # fmt: skip
    began = time.monotonic()
    trained = train_pairs(trainer, task, arm.pair_form, options.seed) if arm.pair_form else None
    if arm.trains and trained is None:
        trainer.train()
    seconds = time.monotonic() - began
    held_out = task.problems(options.held_out, 1, held_out=True)
    greedy, rollouts = measure(trainer, task, held_out)
    sampled, _ = measure(trainer, task, held_out, temperature=1.0, seed=options.seed)
    log = [row for row in trainer.state.log_history if "accuracy" in row]
    tokens = round(sum(row["completions/mean_length"] for row in log) * 24 * 8)
    curve, tokens = (curves(log), tokens) if trained is None else trained
    phases = {name: sum(row.get(name, 0.0) for row in log) for name in ("time/rollout", "time/probe", "time/update")}
    return {
        **{name: getattr(options, name) for name in ("family", "language", "arm", "seed")},
        "machine": machine(),
        "updates": updates if arm.trains and not arm.pair_form else 0,
        "held_out": options.held_out,
        "seconds": round(seconds, 1),
        "phases": {name: round(value, 1) for name, value in phases.items()},
        "sampled_tokens": tokens,
        "greedy": greedy,
        "sampled": sampled,
        "curves": curve,
        "example": [{"prompt": r.row["prompt"], "text": r.text} for r in rollouts[:3]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--family", required=True)
    parser.add_argument("--language", required=True)
    parser.add_argument("--arm", required=True, help="an arm, or make-start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--work", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    if options.arm == "make-start":
        torch.set_num_threads(1)
        folder = start_folder(Path(options.work), options.family, options.language)
        make_start_model(folder, Task(options.family, options.language))
        return
    records.write(Path(options.output), [run(options)])


if __name__ == "__main__":
    main()
