# SPDX-License-Identifier: Apache-2.0
"""The real run on both routes and with TRL's DPOTrainer: the same model, rows, adapter, order and updates.

    python -m benchmarks real-routes --data ../shared/data/gsm8k/example_model_solutions.jsonl

The contestants train one after the other, each in its own process with one thread. Finished ones are kept in --output
and not run again. TRL compares whole solutions. Ours is run on whole solutions too, and on pairs of steps. All get the
same token ids. The time is the processor time of the reference pass and the training, which other jobs on the machine
disturb least. The memory is the process's peak. The same code judges every trained model on the same held-out pairs.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks import records
from sspo_ext.data.tokenize import tokenize_rows
from sspo_ext.train.models import load_model
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

from . import real_run
from .gsm8k import load_gsm8k_solutions

FILE = "real_routes.jsonl"
# name: (who trains, route, which steps are compared)
CONTESTANTS = {
    "linear, steps": ("sspo_ext", "linear", "index"),
    "logits, steps": ("sspo_ext", "logits", "index"),
    "linear, whole solutions": ("sspo_ext", "linear", "sequence"),
    "TRL DPOTrainer, whole solutions": ("trl", "logits", "sequence"),
}

OPTIONS = ["--bf16", "--pairs", "96", "--held-out", "120", "--lr", "8e-4", "--epochs", "0.84"]


def main(argv: list[str]) -> None:
    parser = real_run.parser(__doc__)
    parser.add_argument(
        "--only", choices=list(CONTESTANTS), help="train only this one, in this process, and write its numbers"
    )
    parser.set_defaults(output="benchmarks/results/real_routes", work="build/real_routes")
    options = parser.parse_args([*OPTIONS, *argv])
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.only:
        torch.set_num_threads(1)
        records.add(output / FILE, [{"name": options.only, **run(options.only, options)}], ("name",))
        return
    for name in CONTESTANTS:
        if name not in load(output):
            command = [sys.executable, "-m", "benchmarks", "real-routes", *argv, "--only", name]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    results = load(output)
    (output / "RESULTS.md").write_text(report(results, real_run.shown(argv)))
    print(report(results, real_run.shown(argv)))


def load(output: Path) -> dict[str, dict]:
    """The contestants' recorded results, in the order of `CONTESTANTS`."""
    found = {row["name"]: row for row in records.read(output / FILE)}
    return {name: found[name] for name in CONTESTANTS if name in found}


def run(name: str, options) -> dict:
    """One contestant: its table of held-out judgements, processor seconds and peak memory."""
    who, options.route, options.pairing = CONTESTANTS[name]
    options.save_steps = 1_000_000  # no checkpoint, which would be timed too
    work = Path(options.work) / name.lower().replace(",", "").replace(" ", "_")
    work.mkdir(parents=True, exist_ok=True)
    train_rows, held_rows = load_gsm8k_solutions(options.data)
    model, tokenizer = load_model(real_run.model_folder(options.model))
    # The rows are those that give pairs of steps, so that every contestant sees the same questions.
    kept = tokenize_rows(train_rows, tokenizer, pair_by="index", max_length=options.max_length)[: options.pairs]
    sources = {f["source"] for f in kept}
    train = tokenize_rows([r for r in train_rows if r["source"] in sources], tokenizer, pair_by=options.pairing)
    whole = tokenize_rows(held_rows, tokenizer, pair_by="sequence", max_length=512)[: options.held_out]

    set_seed(options.seed)
    start = time.process_time()
    trainer: Any
    if who == "trl":
        trainer = trl_trainer(model, tokenizer, train, options, work)
    else:
        trainer = real_run.make_trainer(model, tokenizer, train, options, work)
    seconds = time.process_time() - start
    judge = StepPreferenceTrainer(trainer.model, judge_config(options, work), processing_class=tokenizer)
    before = real_run.scored(judge, whole, work / "before.npz", f"{name}: held-out, before")
    start = time.process_time()
    trainer.train()
    seconds += time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    after = real_run.scored(judge, whole, work / "after.npz", f"{name}: held-out, after")
    log = [e for e in trainer.state.log_history if "loss" in e]
    return {
        "cpu_seconds": seconds,
        "updates": trainer.state.global_step,
        "peak_mib": peak,
        "train": real_run.describe(train),
        "table": real_run.judge(whole, whole, before, after)[:4],
        "log": [{"step": e["step"], "loss": e["loss"]} for e in log],
        "hardware": real_run.hardware(),
        "when": time.strftime("%Y-%m-%d"),
    }


def judge_config(options, work: Path) -> StepPreferenceConfig:
    """For scoring only: without a reference, and on the linear route for every contestant."""
    return StepPreferenceConfig(
        str(work), reference_free=True, bf16=options.bf16, use_cpu=True, report_to="none", dataloader_pin_memory=False
    )


def trl_trainer(model, tokenizer, train: list[dict], options, work: Path):
    """DPOTrainer with the same token ids and optimiser settings as ours, and a reference pass beforehand."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig  # pyright: ignore[reportMissingImports]  # need not be installed
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # it has token ids already

    rows = []
    for feature in train:
        prompt = next(i for i, label in enumerate(feature["chosen_labels"]) if label != -100)
        row = {f"{side}_ids": feature[f"{side}_input_ids"][prompt:] for side in real_run.SIDES}
        rows.append({"prompt_ids": feature["chosen_input_ids"][:prompt], **row})
    args = DPOConfig(
        str(work), beta=options.beta, learning_rate=options.lr, lr_scheduler_type="linear", warmup_steps=5,
        num_train_epochs=options.epochs, per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size, gradient_accumulation_steps=options.gradient_accumulation,
        logging_steps=1, save_strategy="no", seed=options.seed, report_to="none", dataloader_pin_memory=False,
        use_cpu=True, bf16=options.bf16, gradient_checkpointing=False, max_length=512, precompute_ref_log_probs=True,
    )  # fmt: skip
    return Prepared(model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
                    peft_config=real_run.lora_config(options))  # fmt: skip


def report(results: dict[str, dict], arguments: list[str]) -> str:
    first = next(iter(results.values()))
    lines = [
        "# The real run on both routes, and TRL's DPOTrainer",
        "",
        f"`{shlex.join(['python', '-m', 'benchmarks', 'real-routes', *arguments])}`",
        "",
        *real_run.how_made(arguments[arguments.index("--model") + 1] if "--model" in arguments else ""),
        f"SmolLM2-135M, LoRA, bfloat16 autocast, {first['train']['rows']} questions, {first['updates']} updates of 8 "
        "rows, the same token ids and settings for all; 120 held-out questions. Processor seconds of one thread for "
        "reference pass and training; peak resident memory of the process.",
        "",
        "| | CPU seconds | x linear | peak MiB | last loss | reward accuracy (sum) | (mean) | margin (sum) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        same = "linear, steps" if "steps" in name else "linear, whole solutions"
        rewards = {row["name"]: row["after"] for row in result["table"]}
        by_sum, by_mean = rewards["solution, reward sum"], rewards["solution, reward mean"]
        last = sum(e["loss"] for e in result["log"][-4:]) / len(result["log"][-4:])
        lines.append(
            f"| {name} | {result['cpu_seconds']:.0f} | {result['cpu_seconds'] / results[same]['cpu_seconds']:.2f} | "
            f"{result['peak_mib']:.0f} | {last:.3f} | {by_sum['accuracy']:.1%} ± {by_sum['se']:.1%} | "
            f"{by_mean['accuracy']:.1%} ± {by_mean['se']:.1%} | {by_sum['margin']:+.2f} |"
        )
    hardware = first["hardware"]
    lines += [
        "",
        "Last loss: mean of the last four updates. Reward accuracy ± standard error: the share of held-out questions "
        "whose correct solution gained more log-probability than the wrong one.",
        f"{hardware['cpu']}, {hardware['threads']} thread, torch {hardware['torch']}, {first['when']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
