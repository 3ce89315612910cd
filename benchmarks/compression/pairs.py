# SPDX-License-Identifier: Apache-2.0
"""The pair form: preferences between candidate next steps of the same state, and its two controls.

A round samples one solution to each of some new problems. At two random states of each solution it samples candidates
for the next step (`sspo_ext.signals.trace_candidates`). A candidate's value is the reward of its greedy continuation,
discounted by the number of steps. Two candidates of one state with different values are a pair. Of a pair only the
first token that differs is scored. The likelihood of the best candidate and its continuation is added to the loss. The
reference is the policy at the round's start. There are two controls: the likelihood alone, on the same candidates, and
pairs of whole solutions (DPO).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sspo_ext.demo.arms import rows_of
from sspo_ext.demo.tasks import Task
from sspo_ext.hf.forward import forward_hidden
from sspo_ext.hf.head import model_head
from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.logps import linear_step_logps
from sspo_ext.losses.pref import linear_step_pref_loss
from sspo_ext.signals.pairing.candidates import trace_candidates
from sspo_ext.signals.pairing.node import Node
from sspo_ext.signals.pairing.pairs import divergence_index, pair_candidates
from sspo_ext.signals.values import StepBatch
from sspo_ext.train.experience import Rollout
from sspo_ext.train.sspo_trainer import SSPOTrainer

Scored = tuple[tuple[int, ...], int]  # token ids, and the first that is scored


@dataclass(frozen=True)
class PairArm:
    lr: float = 2e-4
    epochs: int = 8
    beta: float = 0.1
    nll: float = 0.3
    pairs: bool = True
    whole: bool = False  # pairs of whole solutions
    rounds: int = 20
    problems: int = 120
    solutions: int = 1  # to each problem
    per_update: int = 64  # states, or problems
    gamma: float = 0.9


@dataclass
class Unit:
    """The pairs of one state or problem, and the solutions to imitate. An update has all of them or none."""

    pairs: list[tuple[Scored, Scored]]  # (winner, loser)
    best: list[Scored]


def train_pairs(trainer: SSPOTrainer, task: Task, arm: PairArm, seed: int) -> tuple[dict, int]:
    """Trains the trainer's model.

    Returns:
        The curves over rounds (accuracy and tokens of the sampled solutions), and the number of sampled tokens. The
        tokens of candidates and continuations are included.
    """
    model, rng = trainer.model, random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.lr, betas=(0.9, 0.95), weight_decay=0.0)
    train = task.problems(arm.rounds * arm.problems, 1000 + seed, held_out=False)
    found: dict[str, list] = {"update": [], "accuracy": [], "tokens": []}
    sampled, updates = 0, 0
    for number in range(arm.rounds):
        rows = rows_of(train[number * arm.problems : (number + 1) * arm.problems]) * arm.solutions
        rollouts = trainer.roll_out(rows, [(seed, number, i) for i in range(len(rows))])
        model.eval()
        units, more = _of_solutions(rollouts, arm, rng) if arm.whole else _of_states(trainer, task, rollouts, arm, rng)
        sampled += more + sum(len(r.completion_ids) for r in rollouts)
        reference = _reference(model, units, trainer.pad_token_id) if arm.pairs else {}
        model.train()
        for _ in range(arm.epochs):
            rng.shuffle(units)
            for first in range(0, len(units), arm.per_update):
                updates += 1
                lr = arm.lr * max(0.05, 1 - number / arm.rounds) * min(1.0, updates / 5)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                some = units[first : first + arm.per_update]
                loss = _loss(model, some, reference, arm, trainer.pad_token_id)
                if loss is None:
                    continue
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accuracy = sum(r.reward for r in rollouts) / len(rollouts)
        tokens = sum(len(r.completion_ids) for r in rollouts) / len(rollouts)
        for name, value in (("update", number + 1), ("accuracy", accuracy), ("tokens", tokens)):
            found[name].append(value)
        print(f"{number + 1} {accuracy:.3f} {tokens:.2f}", flush=True)
    return found, sampled


def _of_states(
    trainer: SSPOTrainer, task: Task, rollouts: Sequence[Rollout], arm: PairArm, rng: random.Random
) -> tuple[list[Unit], int]:
    """Units of two random states of every solution, and the number of tokens sampled for their candidates."""
    kept = [r for r in rollouts if r.steps]
    batch = StepBatch([r.prompt_ids for r in kept], [r.steps for r in kept])
    states = [(b, k) for b, r in enumerate(kept) for k in sorted(rng.sample(range(len(r.steps)), min(2, len(r.steps))))]
    nodes = trace_candidates(
        trainer.model, trainer.processing_class, batch, [r.row["answer"] for r in kept], states=states,
        num_candidates=12, gamma=arm.gamma, grader=lambda text, answer: task.reward("", text, answer),
        max_step_tokens=16, max_continuation_tokens=trainer.args.max_completion_length, seed=rng.randrange(2**30),
    )  # fmt: skip
    tokenizer, units, tokens = trainer.processing_class, [], 0
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    for node in nodes:
        prefix = tuple(batch.sequence(node.sequence)[: batch.boundaries(node.sequence)[node.step]])
        pairs = []
        for pair in pair_candidates([node]):
            at = divergence_index(pair.winner.ids, pair.loser.ids)
            if at is not None:
                winner, loser = ((*prefix, *c.ids[: at + 1]) for c in (pair.winner, pair.loser))
                pairs.append(((winner, len(prefix) + at), (loser, len(prefix) + at)))
        rest = [tokenizer(c.continuation or "").input_ids for c in node.candidates]
        tokens += sum(c.count * len(c.ids) + len(ids) for c, ids in zip(node.candidates, rest, strict=True))
        best = _best(node, rest)
        if best is None:
            continue
        ids = (*prefix, *node.candidates[best].ids, *rest[best], end)
        units.append(Unit(pairs, [(ids, len(prefix))]))
    return units, tokens


def _best(node: Node, rest: Sequence[Sequence[int]]) -> int | None:
    """The candidate with the shortest right solution; None if no candidate leads to the right answer."""
    right = [i for i, c in enumerate(node.candidates) if c.value > 0]
    return min(right, key=lambda i: len(node.candidates[i].ids) + len(rest[i]), default=None)


def _of_solutions(rollouts: Sequence[Rollout], arm: PairArm, rng: random.Random) -> tuple[list[Unit], int]:
    """Random pairs of whole solutions to the same problem with different discounted outcomes."""
    of: dict[tuple, list[Rollout]] = {}
    for r in rollouts:
        of.setdefault(tuple(r.prompt_ids), []).append(r)
    units = []
    for prompt, some in of.items():
        worth = [arm.gamma ** (len(r.steps) - 1) * r.reward if r.steps else 0.0 for r in some]
        pairs = [(i, j) for i in range(len(some)) for j in range(len(some)) if worth[i] > worth[j] + 1e-9]
        chosen = rng.sample(pairs, min(8, len(pairs)))

        def scored(i: int, prompt=prompt, some=some) -> Scored:
            return (*prompt, *some[i].completion_ids), len(prompt)

        if chosen:
            units.append(Unit([(scored(i), scored(j)) for i, j in chosen], [scored(i) for i, _ in chosen]))
    return units, 0


def _loss(model, units: Sequence[Unit], reference: dict, arm: PairArm, pad: int) -> torch.Tensor | None:
    loss, pairs = None, [pair for unit in units for pair in unit.pairs] if arm.pairs else []
    if pairs:
        rows = list(dict.fromkeys(side for pair in pairs for side in pair))
        place = {row: i for i, row in enumerate(rows)}
        hidden, head, layout = _forward(model, rows, pad)
        index = torch.tensor([[place[winner], place[loser]] for winner, loser in pairs])
        ref = torch.tensor([reference[row] for row in rows])
        loss = linear_step_pref_loss(
            hidden, head.weight, layout, StepPairs.from_index(layout, index), ref=ref, beta=arm.beta, **head.options
        ).loss
    best = [row for unit in units for row in unit.best]
    if arm.nll and best:
        hidden, head, layout = _forward(model, best, pad)
        nll = -linear_step_logps(hidden, head.weight, layout, **head.options).tokens.mean()
        loss = arm.nll * nll if loss is None else loss + arm.nll * nll
    return loss


@torch.no_grad()
def _reference(model, units: Sequence[Unit], pad: int) -> dict[Scored, float]:
    rows = list(dict.fromkeys(side for unit in units for pair in unit.pairs for side in pair))
    found = {}
    for some in _chunks(sorted(rows, key=lambda row: len(row[0])), 256):
        hidden, head, layout = _forward(model, some, pad)
        sums = linear_step_logps(hidden, head.weight, layout, **head.options).sums
        found.update(zip(some, sums.tolist(), strict=True))
    return found


def _forward(model, rows: Sequence[Scored], pad: int):
    """Hidden states, LM head and layout. A row is one step, from its first scored token to its end."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row, _ in rows])
    where = torch.arange(length)
    lengths, starts = (torch.tensor(x)[:, None] for x in ([len(row) for row, _ in rows], [s for _, s in rows]))
    scored = (where >= starts) & (where < lengths)
    layout = StepLayout.from_step_ids(ids.masked_fill(~scored, -100), scored.long() - 1)
    hidden, _ = forward_hidden(model, input_ids=ids, attention_mask=(where < lengths).long())
    return hidden, model_head(model), layout


def _chunks(rows: Sequence, size: int) -> Iterator[Sequence]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
