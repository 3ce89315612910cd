# SPDX-License-Identifier: Apache-2.0
"""The arms: what `benchmarks.compression` compares on tiny models, on a pretrained one with an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from benchmarks.compression.arms import Arm, ShuffledValues, ZeroValues
from sspo_ext.hf.wrappers import eval_mode
from sspo_ext.train.experience import Rollout
from sspo_ext.train.sspo_config import SSPOConfig
from sspo_ext.train.sspo_trainer import SSPOTrainer

from ..word_start import padded, solution_loss
from .tasks import Task

_OUTCOME = {"combine": "outcome"}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("start", "start model", trains=False),
        Arm("rloo", "outcome only, RLOO", _OUTCOME),
        *(Arm(f"penalty-{w:g}", f"RLOO, length penalty {w:g}", _OUTCOME, length_penalty=w) for w in (0.25, 0.5, 1.0)),
        Arm("short", "RLOO, short maximal length", _OUTCOME),
        Arm("sspo-0", "SSPO, lambda 0", {"lam": 0.0}),
        Arm("sspo-0-zero", "... V = 0", {"lam": 0.0}, ZeroValues),
        Arm("sspo-0-shuffled", "... V shuffled", {"lam": 0.0}, ShuffledValues),
        Arm("sspo-9", "SSPO, lambda 0.9", {"lam": 0.9}),
        Arm("shortest", "likelihood of its own shortest right answers"),
    )
}

DECISIVE = ("start", "rloo", "sspo-0", "sspo-0-shuffled")


def adapter(model: Any, rank: int, share: float):
    """peft's LoraConfig for the upper layers: the backward pass ends where the lowest adapter is.

    Args:
        model: A Hugging Face causal LM.
        rank: Of the adapter.
        share: Of the layers, counted from the head.

    Returns:
        The config.
    """
    from peft import LoraConfig

    layers = model.config.num_hidden_layers
    upper = "|".join(str(k) for k in range(round(layers * (1 - share)), layers))
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = "|".join(sorted(map(re.escape, linear - {"lm_head"})))
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*\.({upper})\..*({names})", task_type="CAUSAL_LM")


def make_trainer(
    model, tokenizer, task: Task, arm: Arm, folder: Path, settings: dict, *, seed: int, probe: Any,
    callbacks: Sequence[TrainerCallback] = (),
) -> SSPOTrainer:  # fmt: skip
    """Makes a trainer for an arm.

    Args:
        model: The start model, which gets an adapter unless the rank is 0.
        tokenizer: Its tokenizer.
        task: The task.
        arm: The arm.
        folder: The trainer's output folder, with checkpoints.
        settings: Of the command: updates, prompts, num_generations, lr, lora_r, lora_share, engine, device, ...
        seed: Decides the problems and the rollouts.
        probe: What asks for the answer.
        callbacks: Callbacks of Trainer.

    Returns:
        The trainer, ready to train.
    """
    parts = settings["accumulation"]
    length = task.short if arm.name == "short" else settings["max_completion_length"] or task.max_completion_length
    args = SSPOConfig(
        str(folder), max_steps=settings["updates"], seed=seed, num_generations=settings["num_generations"],
        per_device_train_batch_size=settings["prompts"] * settings["num_generations"] // parts,
        gradient_accumulation_steps=parts, learning_rate=settings["lr"], lr_scheduler_type="constant_with_warmup",
        warmup_steps=2, adam_beta2=0.95, optim="adamw_torch", max_grad_norm=1.0, max_completion_length=length,
        probe=probe, rollout_engine=settings["engine"], rollout_batch_size=settings["rollout_batch_size"],
        rollout_options={"model": settings["model_path"]} if settings["engine"] == "vllm" else None,
        prefix_sharing="auto", save_strategy="steps", save_steps=settings["save_steps"], save_total_limit=1,
        report_to="none", disable_tqdm=True, use_cpu=settings["device"] == "cpu", bf16=settings["bf16"],
        dataloader_pin_memory=False, **arm.options,
    )  # fmt: skip

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids) + 1

    config = adapter(model, settings["lora_r"], settings["lora_share"]) if settings["lora_r"] else None
    reward: Callable[..., float] = arm.reward(task, tokens, task.usual)
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in task.train(seed)]
    trainer = arm.trainer(
        model, args, reward, rows, processing_class=tokenizer, peft_config=config, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_shortest(trainer: SSPOTrainer) -> list[dict]:
    """Rejection sampling: the start model's own shortest right answers are made more likely.

    As many completions are drawn as the other arms draw, all before the first update, and there are as many updates.

    Args:
        trainer: Its model, data and options.

    Returns:
        A row of the log for each update.
    """
    args, sampler = trainer.args, iter(trainer._get_train_sampler())
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    order: list[list[int]] = []
    while len(order) < args.max_steps:
        try:
            order.append([next(sampler) for _ in range(size)])
        except StopIteration:
            sampler = iter(trainer._get_train_sampler())
    dataset: Any = trainer.train_dataset
    chosen, log = [], []
    with eval_mode(trainer.model):
        for update, rows in enumerate(order):
            seeds = [(args.seed, update, place) for place in range(size)]
            rollouts = trainer.roll_out([dataset[i] for i in rows], seeds)
            chosen.append(shortest_right(rollouts, args.num_generations))
            right = sum(r.reward >= 1 for r in rollouts) / size
            length = sum(len(r.completion_ids) for r in rollouts) / size
            log.append({"step": update + 1, "accuracy": right, "completions/mean_length": length})
            print(f"{update + 1} {right:.3f} {length:.2f}", flush=True)
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
    model.train()
    for update, some in enumerate(chosen):
        if not some:
            continue
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((update + 1) / 2, 1.0)
        ids, labels = padded([(r.prompt_ids, r.completion_ids) for r in some], trainer.pad_token_id)
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = solution_loss(model, ids.to(device), labels.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return log


def shortest_right(rollouts: Sequence[Rollout], group: int) -> list[Rollout]:
    """Of each group of `group` rollouts the right one with the fewest tokens; none of a group without a right one."""
    found = []
    for start in range(0, len(rollouts), group):
        right = [r for r in rollouts[start : start + group] if r.reward >= 1]
        found += [min(right, key=lambda r: len(r.completion_ids))] if right else []
    return found
