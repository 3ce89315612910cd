# SPDX-License-Identifier: Apache-2.0
"""Makes a start model: a small Llama imitates the wordy teacher of `sspo_ext.demo.tasks`.

    python -m sspo_ext.demo.imitate --output-dir sspo_ext/demo/start

made the model that the demo ships with (sums, English, seed 0; 233k weights in bfloat16).
"""

from __future__ import annotations

import argparse
import math
import os
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .._help import DefaultsFormatter
from .tasks import FAMILIES, LANGUAGES, Task, solution_text


def new_model(tokenizer, *, hidden_size: int = 96, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with two layers, four attention heads and random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def imitate(
    model: LlamaForCausalLM, tokenizer, task: Task, *, steps: int, lr: float = 3e-3, batch_size: int = 32, seed: int = 0
) -> list[float]:
    """Trains the model to predict the teacher's solutions, which are new each time.

    Args:
        model: The model to train.
        tokenizer: The task's tokenizer.
        task: The task, with its teacher.
        steps: Updates.
        lr: The peak learning rate.
        batch_size: Solutions in an update.
        seed: Decides the problems and the solutions.

    Returns:
        The loss of every update.
    """
    rng, losses = random.Random(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 50, 0.05 + 0.475 * (1 + math.cos(math.pi * k / steps)))
    )
    train = task.problems(min(8000, 40 * steps), seed + 2, held_out=False)
    model.train()
    with tqdm(range(steps), desc=f"imitating the teacher ({task.family}, {task.language})", mininterval=2) as bar:
        for step in bar:
            batch = rng.choices(train, k=batch_size)
            texts = [p.prompt + solution_text(task.demonstration(p, rng)) + " " + tokenizer.eos_token for p in batch]
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
            if step % 50 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def make_start_model(folder: str | os.PathLike, task: Task, *, steps: int = 2200, seed: int = 0) -> None:
    """Trains a model, and saves it (weights in bfloat16) with its tokenizer. The folder appears when all is written."""
    tokenizer = task.tokenizer()
    model = new_model(tokenizer, seed=seed)
    imitate(model, tokenizer, task, steps=steps, seed=seed)
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    model.bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], formatter_class=DefaultsFormatter)
    parser.add_argument("--output-dir", required=True, help="a new folder for model and tokenizer")
    parser.add_argument("--family", choices=FAMILIES, default="sums", help="family of tasks")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="language of prompts and steps")
    parser.add_argument("--steps", type=int, default=2200, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="decides the weights and the problems")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = Task(options.family, options.language)
    make_start_model(options.output_dir, task, steps=options.steps, seed=options.seed)


if __name__ == "__main__":
    main()
