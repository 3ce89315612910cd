# SPDX-License-Identifier: Apache-2.0
"""What the scripts in `examples/` share: completions, pairs, batches, a short training loop, a score and a table.

They are made for the small start model of `load_start` and the tasks of `sspo_ext.demo.tasks`, which are public with
this module. For your own models the trainers of `sspo_ext.train` do the same, and more. Importing it sets torch to one
thread.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..data.collator import StepPreferenceCollator
from ..data.rows import load_preference_rows
from ..data.tokenize import tokenize_rows
from ..layout.steps import StepLayout
from ..losses.logps import step_logps
from ..losses.pref import StepPrefOutput, step_pref_loss
from ..signals.values import StepBatch
from ..train.rollout import end_tokens, make_engine
from ..train.sampling import Completions, Sampling
from .arms import MAX_TOKENS, load_start
from .tasks import Problem, Task

__all__ = [
    "Problem", "Task", "complete", "dpo", "features", "load_start", "policy_batch", "sampled", "sampled_pairs", "score",
    "sized", "table", "train",
]  # fmt: skip

disable_progress_bar()  # the start model has half a megabyte
torch.set_num_threads(1)  # and no work for two, which wait for each other: ten times as long where other programs run


def sized(full: int, quick: int) -> int:
    """`quick` if the script was called with --quick, as its test does, else `full`."""
    return quick if "--quick" in sys.argv[1:] else full


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> list[str]:
    """Completes texts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: The texts.
        temperature: 0 is greedy.
        max_new_tokens: Where a completion is cut off.
        seed: Decides what is drawn.

    Returns:
        One text for each prompt, without an end of sequence. One that was cut off ends in a newline.
    """
    ends = end_tokens(model, tokenizer)
    engine = make_engine("compact", tokenizer)
    seeds = [(seed, i) for i in range(len(prompts))]
    with torch.no_grad():
        sampling = Sampling(max_new_tokens, ends, temperature)
        found = engine.complete(model.eval(), tokenizer(list(prompts))["input_ids"], sampling, seeds)
    ids = found.token_ids if isinstance(found, Completions) else found
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        text if row[-1:] and row[-1] in ends else text.rstrip() + " \n" for text, row in zip(texts, ids, strict=True)
    ]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, problems: Sequence[Problem]
) -> dict[str, float]:
    """Completes problems greedily and, with a fixed seed, by sampling.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The task of the problems.
        problems: The problems.

    Returns:
        "greedy" and "sampled", shares of right answers, and "tokens", the mean length of a greedy completion.
    """
    found = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        texts = complete(model, tokenizer, [p.prompt for p in problems], temperature=temperature)
        found[name] = sum(task.reward(p.prompt, t, p.answer) for p, t in zip(problems, texts, strict=True))
        found["tokens"] = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    return {name: found[name] / len(problems) for name in ("greedy", "sampled", "tokens")}


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int = 8,
    seed: int = 0,
) -> list[list[tuple[str, float]]]:
    """Samples completions of each problem and grades them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The task of the problems.
        problems: The problems.
        samples: Completions of each.
        seed: Decides what is drawn.

    Returns:
        For each problem its completions, each with its reward: 1 for the right answer, else 0.
    """
    texts = complete(model, tokenizer, [p.prompt for p in problems for _ in range(samples)], seed=seed)
    groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return [[(t, task.reward(p.prompt, t, p.answer)) for t in group] for p, group in zip(problems, groups, strict=True)]


def sampled_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int = 8,
    seed: int = 0,
) -> list[dict]:
    """Preference rows of the model's own completions: a right one against a wrong one of the same problem.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The task of the problems.
        problems: The problems. One that is always right or always wrong gives no row.
        samples: Completions of each.
        seed: Decides what is drawn.

    Returns:
        Rows {"prompt", "chosen", "rejected"}, at most one for each problem.
    """
    rows = []
    graded = sampled(model, tokenizer, task, problems, samples=samples, seed=seed)
    for problem, group in zip(problems, graded, strict=True):
        right, wrong = ([text for text, reward in group if reward == r] for r in (1.0, 0.0))
        if right and wrong:
            rows.append({"prompt": problem.prompt, "chosen": right[0], "rejected": wrong[0]})
    return rows


def features(rows: Iterable[Mapping], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[dict]:
    """`tokenize_rows(load_preference_rows(rows))`; `options` are those of `tokenize_row`."""
    return tokenize_rows(load_preference_rows(list(rows)), tokenizer, **options)


def policy_batch(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], steps: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """A right-padded batch of responses that are cut into steps.

    Args:
        tokenizer: The tokenizer. Each step is tokenized by itself, and the last one gets the end of sequence unless it
            ends in a newline.
        prompts: The prompts.
        steps: For each prompt the steps of its response.

    Returns:
        "inputs", the model's arguments, among them input_ids and attention_mask (B, T) int64; "layout", a StepLayout in
        which every token of the responses is scored; and "batch", the same as a StepBatch.
    """
    eos: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    ids, step_ids = [], []
    for prompt, response in zip(prompts, steps, strict=True):
        row = list(tokenizer(prompt)["input_ids"])
        where = [-1] * len(row)
        for k, step in enumerate(response):
            tokens: list[int] = list(tokenizer(step)["input_ids"])
            if k == len(response) - 1 and not step.endswith("\n"):
                tokens.append(eos)
            row += tokens
            where += [k] * len(tokens)
        ids.append(torch.tensor(row))
        step_ids.append(torch.tensor(where))

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    where = padded(step_ids, -1)
    input_ids = padded(ids, pad)
    mask = padded([torch.ones_like(row) for row in ids], 0)
    layout = StepLayout.from_step_ids(torch.where(where >= 0, input_ids, -100), where)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    return {"inputs": inputs, "layout": layout, "batch": StepBatch.from_tensors(input_ids, where, mask)}


def _collate(rows: list[dict]) -> dict:
    batch = StepPreferenceCollator(0)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {**batch, "inputs": {**inputs, "use_cache": False}}


def train(
    model: PreTrainedModel,
    rows: Sequence,
    loss: Callable[[dict], Tensor],
    *,
    updates: int,
    batch_size: int = 16,
    lr: float = 1e-4,
    seed: int = 0,
    sampler: Iterable[int] | None = None,
    collate: Callable[[list], dict] | None = None,
) -> list[float]:
    """Trains on batches of rows with AdamW.

    Args:
        model: The model. Only its parameters that require a gradient are trained.
        rows: Features of `features`, or whatever `collate` takes.
        loss: Takes a batch. That of features is what `StepPreferenceCollator` makes, with the model's arguments as
            "inputs" beside it.
        updates: The number of updates.
        batch_size: Rows in an update.
        lr: The learning rate, constant.
        seed: Decides the order of the rows.
        sampler: The order in place of a shuffled one, as for a DataLoader. It begins anew where it ends.
        collate: Makes a batch of some rows, in place of StepPreferenceCollator.

    Returns:
        The loss of every update.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    order, rng, losses = [], random.Random(seed), []
    for _ in range(updates):
        while len(order) < batch_size:
            order += rng.sample(range(len(rows)), len(rows)) if sampler is None else list(sampler)
        some, order = order[:batch_size], order[batch_size:]
        value = loss((collate or _collate)([rows[i] for i in some]))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


def dpo(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    rows: Sequence[dict],
    *,
    beta: float = 0.5,
    **options: Any,
) -> StepPrefOutput:
    """DPO: `train` with `step_pref_loss`.

    Args:
        model: The model to train.
        reference: The frozen model of the reference.
        rows: Features of `features`.
        beta: That of the loss.
        **options: Of `train`.

    Returns:
        The loss of the last update, with its metrics.
    """
    last: list[StepPrefOutput] = []

    def loss(batch: dict) -> Tensor:
        layout, pairs = batch["layout"], batch["pairs"]
        with torch.no_grad():
            ref = step_logps(reference(**batch["inputs"]).logits, layout).sums
        last[:] = [step_pref_loss(model(**batch["inputs"]).logits, layout, pairs, ref=ref, beta=beta)]
        return last[0].loss

    train(model, rows, loss, **options)
    return last[0]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table in markdown; floats get three digits."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n]) for n in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
