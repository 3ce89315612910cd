"""What the demo and the compression benchmark share: from a start model through `SSPOTrainer` to numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from ..train.experience import Rollout
from ..train.sspo_config import SSPOConfig
from ..train.sspo_trainer import SSPOTrainer
from .tasks import Problem, Task

START = Path(__file__).parent / "start"

MAX_TOKENS = 110  # a wordy solution has 47


def load_start(folder: str | os.PathLike = START) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The start model in float32, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def rows_of(problems: Sequence[Problem]) -> list[dict]:
    return [{"prompt": p.prompt, "answer": p.answer, "problem": p} for p in problems]


def make_trainer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    folder: str | os.PathLike,
    *,
    updates: int,
    seed: int,
    prompts: int = 24,
    num_generations: int = 8,
    reward=None,
    trainer_class: type[SSPOTrainer] = SSPOTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    **options,
) -> SSPOTrainer:
    """A trainer of `prompts` x `num_generations` (a multiple of 4) completions an update. `options` go to SSPOConfig:
    gamma, lam, ..."""
    defaults = dict(
        max_completion_length=MAX_TOKENS, learning_rate=5e-4, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        adam_beta2=0.95, optim="adamw_torch", probe=task.probe, probe_end=f" {tokenizer.eos_token}",
        rollout_engine="compact",
    )  # fmt: skip
    args = SSPOConfig(
        str(folder), max_steps=updates, seed=seed, num_generations=num_generations,
        per_device_train_batch_size=prompts * num_generations // 4, gradient_accumulation_steps=4, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **{**defaults, **options},
    )  # fmt: skip
    train = rows_of(task.problems(max(prompts * min(updates, 200), prompts), 1000 + seed, held_out=False))
    trainer = trainer_class(
        model, args, reward or task.reward, train, processing_class=tokenizer, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(
    trainer: SSPOTrainer, task: Task, problems: Sequence[Problem], *, temperature: float = 0.0, seed: int = 0
) -> tuple[dict, list[Rollout]]:
    """One completion of each problem: per-problem lists of correct, tokens, steps and skipped needed steps."""
    seeds = [(seed, i) for i in range(len(problems))]
    rollouts = trainer.roll_out(rows_of(problems), seeds, temperature=temperature)
    reviews = [task.review(p, r.text) for p, r in zip(problems, rollouts, strict=True)]
    # a completion that was cut off may hold the answer, and is wrong
    found = {
        "correct": [int(v.correct and r.ended) for v, r in zip(reviews, rollouts, strict=True)],
        "tokens": [len(r.completion_ids) for r in rollouts],
        "steps": [len(r.steps) for r in rollouts],
        "skipped": [v.skipped for v in reviews],
    }
    return found, rollouts


def means(found: dict) -> dict[str, float]:
    return {
        "accuracy" if name == "correct" else name: sum(values) / max(len(values), 1) for name, values in found.items()
    }


class Progress(TrainerCallback):
    """One bar over all updates of all arms."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "accuracy" in logs:
            self.bar.set_postfix(accuracy=f"{logs['accuracy']:.2f}", tokens=f"{logs['completions/mean_length']:.1f}")
            self.bar.update(1)
