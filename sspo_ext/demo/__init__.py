"""`sspo-ext demo`: a small language model unlearns bad habits from step preferences, offline, in minutes on two cores.

A two-layer Llama first imitates a teacher who loses carries, takes the smaller number from the larger, and repeats
himself. Then, three times: it writes solutions to new problems, a verifier finds the first bad line of each, and the
pair (the line that should stand there, the line that does) trains it with `step_pref_loss`, against a reference that is
the model at the start of the round. Problems of the table are in neither stage.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from .. import step_logps
from ..train.collator import StepPreferenceCollator
from ..train.data import load_preference_rows
from ..train.tokenize import tokenize_rows
from ..train.trainer import StepPreferenceConfig, StepPreferenceTrainer
from .task import Problem, apply, branch_row, demonstration, make_tokenizer, problems, review, text_of


@dataclass(frozen=True)
class DemoConfig:
    seed: int = 0
    held_out: int = 400
    imitation_steps: int = 1000
    imitation_lr: float = 3e-3
    rounds: int = 3
    problems_per_round: int = 600
    batch_size: int = 32
    lr: float = 2e-4
    beta: float = 0.3
    loss_type: str = "sigmoid"
    hidden_size: int = 96


def run(output_dir: str | os.PathLike, config: DemoConfig | None = None) -> dict:
    """Trains, prints the table, writes demo.png, demo.json and the model; returns what demo.json holds.

    Runs on one thread: matrices this small gain nothing from a second, and the numbers depend on the seed alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(Path(output_dir), config or DemoConfig())
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, config: DemoConfig) -> dict:
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    held_out = problems(config.held_out, seed=config.seed + 1)
    unseen = frozenset(p.expression for p in held_out)
    train = problems(8000 + config.rounds * config.problems_per_round, seed=config.seed + 2, exclude=unseen)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=config.hidden_size, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    imitation_loss = imitate(model, tokenizer, train[:8000], config)

    held_out_pairs = collect_pairs(model, tokenizer, held_out)
    stages = [evaluate(model, tokenizer, held_out, held_out_pairs, config)]
    belief = [operation_tables(model, tokenizer)]
    log, fresh = [], train[8000:]
    total = config.rounds * config.problems_per_round
    with tqdm(total=total, desc="step preferences", unit="pair") as bar:
        for number in range(config.rounds):
            todo = fresh[number * config.problems_per_round :][: config.problems_per_round]
            rows = collect_pairs(model, tokenizer, todo)
            lr = config.lr * (1 - number / config.rounds)
            log += learn(model, tokenizer, rows, config, lr, folder / "rounds" / str(number), bar)
            stages.append(evaluate(model, tokenizer, held_out, held_out_pairs, config))
    belief.append(operation_tables(model, tokenizer))

    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    result = {
        "config": asdict(config), "seconds": round(time.monotonic() - start, 1), "held_out_pairs": len(held_out_pairs),
        "imitation_loss": imitation_loss, "log": log, "stages": stages, "belief": belief,
    }  # fmt: skip
    (folder / "demo.json").write_text(json.dumps(result) + "\n")
    from .picture import draw

    draw(result, folder / "demo.png")
    print("\n" + table(stages))
    print(f"\n{result['seconds']:.0f} s. Picture: {folder / 'demo.png'}  Model: {folder / 'model'}")
    return result


def imitate(model, tokenizer, train: Sequence[Problem], config: DemoConfig) -> list[float]:
    """Next-token training on the teacher's solutions, a fresh one each time a problem comes up."""
    rng, losses = random.Random(config.seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.imitation_lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.imitation_lr, config.imitation_steps, pct_start=0.05
    )
    model.train()
    with tqdm(range(config.imitation_steps), desc="imitating the teacher") as bar:
        for step in bar:
            batch = rng.choices(train, k=32)
            texts = [p.prompt + demonstration(p, rng) + tokenizer.eos_token for p in batch]
            inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            prompts = torch.tensor([len(tokenizer(p.prompt).input_ids) for p in batch])
            ids, scored = inputs.input_ids, inputs.attention_mask.bool()
            scored &= torch.arange(ids.shape[1]) >= prompts[:, None]
            logits = model(input_ids=ids, attention_mask=inputs.attention_mask, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits[scored[:, 1:]], ids[:, 1:][scored[:, 1:]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def write(model, tokenizer, todo: Sequence[Problem], *, sample: bool) -> list[str]:
    """One solution to each problem: sampled at temperature 1, or greedy."""
    model.eval()
    inputs = tokenizer([p.prompt for p in todo], padding=True, return_tensors="pt", return_token_type_ids=False)
    longest = 10 * 7 + 10  # five operations and five repeats of up to six words and a newline, and the answer
    out = model.generate(**inputs, max_new_tokens=longest, do_sample=sample, top_k=0, renormalize_logits=False)
    return [text_of(tokenizer, ids) for ids in out[:, inputs.input_ids.shape[1] :].tolist()]


def collect_pairs(model, tokenizer, todo: Sequence[Problem]) -> list[dict]:
    """The first bad line of a sampled solution to each problem, against the line that should stand there."""
    texts = write(model, tokenizer, todo, sample=True)
    rows = [branch_row(problem, review(problem, text)) for problem, text in zip(todo, texts, strict=True)]
    return [row for row in rows if row is not None]


def features_of(rows: list[dict], tokenizer) -> list[dict]:
    return tokenize_rows(load_preference_rows(rows), tokenizer, pair_by="branch")


def learn(model, tokenizer, rows: list[dict], config: DemoConfig, lr: float, folder: Path, bar: tqdm) -> list[dict]:
    """One round of step preference training; returns its log."""
    args = StepPreferenceConfig(
        str(folder), loss_type=config.loss_type, beta=config.beta, learning_rate=lr, lr_scheduler_type="linear",
        num_train_epochs=1, per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=64,
        warmup_steps=2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=config.seed,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = StepPreferenceTrainer(
        model, args, features_of(rows, tokenizer), processing_class=tokenizer, callbacks=[_Progress(bar)]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    keep = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    return [{k: entry[k] for k in keep} for entry in trainer.state.log_history if "loss" in entry]


class _Progress(TrainerCallback):
    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", margin=f"{logs['rewards/margins']:.2f}")
            self.bar.update(int(logs["pairs/count"]))


def evaluate(model, tokenizer, held_out: Sequence[Problem], pairs: list[dict], config: DemoConfig) -> dict:
    """Greedy solutions of the held-out problems, and the model's own preference between right and bad steps."""
    texts = write(model, tokenizer, held_out, sample=False)
    reviews = [review(p, text) for p, text in zip(held_out, texts, strict=True)]
    n = len(reviews)
    result = {
        "accuracy": sum(r.correct for r in reviews) / n,
        "slips": sum(r.kind == "slip" for r in reviews) / n,
        "redundant": sum(r.kind == "redundant" for r in reviews) / n,
        "tokens": sum(len(tokenizer(text).input_ids) + 1 for text in texts) / n,
        "example": [{"prompt": p.prompt, "text": t} for p, t in list(zip(held_out, texts, strict=True))[:40]],
    }
    for kind in ("slip", "redundant"):
        margins = step_margins(model, tokenizer, [row for row in pairs if row["kind"] == kind])
        result[f"{kind}_pairs"] = {
            "preference_accuracy": sum(m > 0 for m in margins) / max(len(margins), 1),
            "margin": sum(margins) / max(len(margins), 1),
            "margins": margins,
        }
    return result


@torch.no_grad()
def step_margins(model, tokenizer, rows: list[dict]) -> list[float]:
    """log pi(right step) - log pi(bad step) of each pair."""
    model.eval()
    margins: list[float] = []
    features = features_of(rows, tokenizer) if rows else []
    collate = StepPreferenceCollator(tokenizer.pad_token_id)
    for i in range(0, len(features), 64):
        batch = collate(features[i : i + 64])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        sums = step_logps(logits, batch["layout"]).sums
        right, bad = batch["pairs"].index.long().unbind(1)
        margins += (sums[right] - sums[bad]).tolist()
    return margins


@torch.no_grad()
def operation_tables(model, tokenizer) -> dict[str, list[list[float]]]:
    """Probability that the model gives to the right result of a + b and a - b, rows a = 0..15, columns b = 0..9."""
    model.eval()
    tables = {}
    for op in "+-":
        texts, results = [], []
        for a, b in itertools.product(range(16), range(10)):
            x, y = min(a, 9), a - min(a, 9)
            texts.append(f"{x} + {y} {op} {b} + 1 =\n{x} + {y} = {a}\n{a} {op} {b} =")
            results.append(apply(op, a, b))
        inputs = tokenizer(texts, return_tensors="pt", return_token_type_ids=False)  # all of one length
        probability = model(**inputs, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(r) for r in results]))
        tables[op] = probability.gather(1, ids[:, None]).reshape(16, 10).tolist()
    return tables


def table(stages: list[dict]) -> str:
    """Before and after on the held-out problems, in markdown."""
    before, after = stages[0], stages[-1]

    def row(name: str, get, form: str = "{:.1%}") -> str:
        return f"| {name} | {form.format(get(before))} | {form.format(get(after))} |"

    lines = [
        "| on held-out problems | imitation only | after step preferences |",
        "| --- | --- | --- |",
        row("right answer, greedy", lambda s: s["accuracy"]),
        row("solutions with a wrong step first", lambda s: s["slips"]),
        row("solutions with a redundant step first", lambda s: s["redundant"]),
        row("tokens per solution", lambda s: s["tokens"], "{:.1f}"),
        row("prefers right step to wrong one", lambda s: s["slip_pairs"]["preference_accuracy"]),
        row("... margin, nats", lambda s: s["slip_pairs"]["margin"], "{:+.2f}"),
        row("prefers needed step to redundant one", lambda s: s["redundant_pairs"]["preference_accuracy"]),
        row("... margin, nats", lambda s: s["redundant_pairs"]["margin"], "{:+.2f}"),
    ]
    return "\n".join(lines)
