# SPDX-License-Identifier: Apache-2.0
"""What the demo and the compression benchmark share: a start model, its training by `SSPOTrainer`, and numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from ..train.experience import Rollout
from ..train.sspo_config import SSPOConfig
from ..train.sspo_trainer import SSPOTrainer
from .tasks import Problem, Task

START = Path(__file__).parent / "start"

MAX_TOKENS = 110  # more than twice the 47 tokens of a wordy solution


def load_start(folder: str | os.PathLike = START) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Loads the start model in float32, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def rows_of(problems: Sequence[Problem]) -> list[dict]:
    """The problems as rows for SSPOTrainer."""
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
    """Makes a trainer on one task.

    Args:
        model: The start model, which is trained.
        tokenizer: The task's tokenizer.
        task: The task.
        folder: The trainer's output folder.
        updates: The number of updates.
        seed: Decides the problems and the rollouts.
        prompts: Prompts in an update.
        num_generations: Completions of each prompt. An update has `prompts` x `num_generations`, a multiple of 4.
        reward: In place of the task's reward.
        trainer_class: In place of SSPOTrainer.
        callbacks: Callbacks of Trainer.
        **options: Options of SSPOConfig: gamma, lam, ...

    Returns:
        The trainer, ready to train.
    """
    defaults: dict[str, Any] = dict(
        max_completion_length=MAX_TOKENS, learning_rate=5e-4, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        adam_beta2=0.95, optim="adamw_torch", probe=task.probe, probe_end=f" {tokenizer.eos_token}",
        rollout_engine="compact", prefix_sharing=False,  # a run of other sums is another run: the tables stay
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
    """Completes each problem once.

    Args:
        trainer: Its model and its engine complete the problems.
        task: The task of the problems.
        problems: The problems.
        temperature: 0 is greedy.
        seed: Decides what is drawn.

    Returns:
        One list for each of "correct" (0 or 1), "tokens", "steps" and "skipped" (needed steps), with one number for
        each problem; and the rollouts.
    """
    seeds = [(seed, i) for i in range(len(problems))]
    rollouts = trainer.roll_out(rows_of(problems), seeds, temperature=temperature)
    reviews = [task.review(p, r.text) for p, r in zip(problems, rollouts, strict=True)]
    # A completion that was cut off counts as wrong, even if it holds the answer.
    found = {
        "correct": [int(v.correct and r.ended) for v, r in zip(reviews, rollouts, strict=True)],
        "tokens": [len(r.completion_ids) for r in rollouts],
        "steps": [len(r.steps) for r in rollouts],
        "skipped": [v.skipped for v in reviews],
    }
    return found, rollouts


def means(found: dict) -> dict[str, float]:
    """Means over the problems; that of "correct" is called "accuracy"."""
    return {
        "accuracy" if name == "correct" else name: sum(values) / max(len(values), 1) for name, values in found.items()
    }


class Progress(TrainerCallback):
    """Advances one bar over the updates of all arms."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs):
        """Shows accuracy and tokens of the update."""
        if logs is not None and "accuracy" in logs:
            self.bar.set_postfix(accuracy=f"{logs['accuracy']:.2f}", tokens=f"{logs['completions/mean_length']:.1f}")
            self.bar.update(1)
