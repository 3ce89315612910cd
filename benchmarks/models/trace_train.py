# SPDX-License-Identifier: Apache-2.0
"""Step preferences that a model found itself, compared with whole solutions: same trainer, updates, held-out pairs.

    python -m benchmarks trace-train --data ../shared/data/gsm8k/example_model_solutions.jsonl

Two arms start from the same model. In "traced" the model samples next steps at random states of solutions of the
training questions. A probe ranks them, and the model trains on pairs after the same state. "sequence" is DPO between a
correct and a wrong solution of the same questions. Both are judged like `real_run`, before and after: is the correct
solution of a held-out question more probable than the wrong one, and what did training change? Neither arm needs labels
of steps. The traced arm uses the gold answer. The sequence arm uses which solution is correct.

The ranking is our reconstruction. A 135M model hardly ever solves one of these problems. Its values therefore come from
the probe and not from continuations, and its accuracy when it writes solutions is not measured.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import set_seed

from benchmarks import records
from sspo_ext.data.rows import load_preference_rows
from sspo_ext.data.tokenize import tokenize_rows
from sspo_ext.tracing.chains import load_chains
from sspo_ext.tracing.values import trace_pairs
from sspo_ext.train.checkpoints import newest_checkpoint
from sspo_ext.train.models import load_model

from .gsm8k import load_gsm8k_solutions
from .real_run import (
    command_line,
    describe,
    hardware,
    how_made,
    judge,
    make_trainer,
    margins,
    model_folder,
    parser,
    scored,
)
from .trace_run import PROBE, bar, select


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    work, output = Path(options.work), Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    train_rows, held_rows = load_gsm8k_solutions(options.data)
    model, tokenizer = load_model(model_folder(options.model))
    whole = tokenize_rows(held_rows, tokenizer, pair_by="sequence", max_length=512)[: options.held_out]
    sources = {f["source"] for f in whole}
    held = tokenize_rows([r for r in held_rows if r["source"] in sources], tokenizer, pair_by="branch")

    prompts = list(dict.fromkeys(row["prompt"] for row in train_rows))[: options.questions]
    sequences = [row for row in train_rows if row["prompt"] in set(prompts)]
    arms = {
        "traced": tokenize_rows(
            traced(model, tokenizer, options, set(prompts), work), tokenizer, token_weights=options.token_weights
        ),
        "sequence": tokenize_rows(sequences, tokenizer, pair_by="sequence", max_length=options.max_length),
    }
    rows = min([options.rows, *map(len, arms.values())])
    result = {
        "command": command_line("trace-train", argv),
        "options": {
            **{k: v for k, v in vars(options).items() if k not in ("data", "work", "output")},
            "model": Path(options.model).name,
        },
        "hardware": hardware(),
        "held_out": describe(whole),
        "arms": {},
    }
    gains: dict[str, dict] = {}
    for name, features in arms.items():
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(options.seed)
        model, _ = load_model(model_folder(options.model))
        # Rows are taken evenly, so that both arms see all questions.
        train = [features[i * len(features) // rows] for i in range(rows)]
        trainer = make_trainer(model, tokenizer, train, options, folder)
        before = scored(trainer, whole, work / "before.npz", "held-out, before")
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
        after = scored(trainer, whole, folder / "after.npz", f"held-out, after {name}")
        gains[name] = {by: margins(whole, after, by) - margins(whole, before, by) for by in ("sum", "mean")}
        result["arms"][name] = {
            "train": describe(train),
            "table": judge(whole, held, before, after),
            "speed": json.loads((folder / "speed.json").read_text()),
        }
    result["differences"] = {
        f"solution, reward {by}": paired(*(gains[name][by] for name in ("sequence", "traced")))
        for by in ("sum", "mean")
    }
    records.write(output / "trace_train.jsonl", [result])
    text = records.with_notes(report(result), output)
    (output / "RESULTS.md").write_text(text)
    print(text)


def parse(argv: list[str] | None):
    options = parser(__doc__)
    options.set_defaults(output="benchmarks/results/trace_train", work="build/trace_train", pairing="branch")
    add = options.add_argument
    add("--questions", type=int, default=60, help="training questions, the same for both arms")
    add("--rows", type=int, default=120, help="of each arm, at most")
    add("--states", type=int, default=2, help="traced: random states of each solution")
    add("--candidates", type=int, default=8, help="traced: next steps sampled at each")
    add("--max-pairs", type=int, default=2, help="traced: pairs of one state, at most")
    add("--min-gap", type=float, default=0.02, help="traced: least difference in value of a pair")
    add(
        "--token-weights",
        default="divergence",
        choices=("uniform", "divergence"),
        help="traced: weights of a step's tokens",
    )
    add("--threads", type=int, default=1, help="of torch")
    return options.parse_args(argv)


def traced(model, tokenizer, options, prompts: set[str], work: Path) -> list[dict]:
    rows = [row for row in select(options.data, 10**9)[0] if row["prompt"] in prompts]
    chains, _ = load_chains(rows, tokenizer, max_length=options.max_length)
    path = work / "pairs.jsonl"
    trace_pairs(
        model, tokenizer, chains, path, states_per_chain=options.states, value="probe", probe=PROBE,
        num_candidates=options.candidates, max_step_tokens=64, seed=options.seed, resume=True,
        pairing={"min_gap": options.min_gap, "max_pairs": options.max_pairs}, progress=bar("tracing"),
        settings={"model": Path(options.model).name},
    )  # fmt: skip
    return load_preference_rows(path)


def paired(gains, others) -> dict[str, float]:
    """Difference of the two shares of questions with a positive gain, and its standard error."""
    each = (gains > 0).astype(float) - (others > 0)
    return {"mean": each.mean(), "se": each.std(ddof=1) / len(each) ** 0.5}


def report(result: dict) -> str:
    options, hardware = result["options"], result["hardware"]
    arms = result["arms"]

    def cell(value: dict | None) -> str:
        return "50.0%" if value is None else f"{value['accuracy']:.1%} ± {value['se']:.1%}"

    tables = {name: {row["name"]: row for row in arm["table"]} for name, arm in arms.items()}
    lines = [
        "# Traced step preferences against whole solutions",
        "",
        f"`{result['command']}`",
        "",
        *how_made(options["model"]),
        f"{Path(options['model']).name}, LoRA of rank {options['lora_r']}, loss `{options['loss_type']}`, beta "
        f"{options['beta']}, lr {options['lr']}; traced pairs: token weights `{options['token_weights']}`.",
        "",
        "| held-out accuracy | n | before | " + " | ".join(f"after {name}" for name in arms) + " |",
        "| --- | --- | --- |" + " --- |" * len(arms),
        *(
            f"| {name} | {row['n']} | {cell(row['before'])} | "
            + " | ".join(cell(tables[arm][name]["after"]) for arm in arms)
            + " |"
            for name, row in tables["traced"].items()
        ),
        "",
        *(
            f"{what.capitalize()}: sequence less traced {d['mean']:+.1%} ± {d['se']:.1%}, question by question."
            for what, d in result["differences"].items()
        ),
        "",
        *(
            f"{name}: {arm['train']['rows']} rows, {arm['train']['tokens']} tokens, {arm['speed']['updates']} updates, "
            f"{arm['speed']['train_seconds']:.0f} s, {arm['speed']['tokens_per_second']:.0f} tokens/s, "
            f"{arm['speed']['peak_rss_mib']:.0f} MiB."
            for name, arm in arms.items()
        ),
        "",
        f"Accuracy ± standard error; {hardware['cpu']}, {hardware['threads']} thread, torch {hardware['torch']}.",
        "",
        *([options["note"], ""] if options["note"] else []),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
