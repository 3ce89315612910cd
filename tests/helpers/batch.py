# SPDX-License-Identifier: Apache-2.0
"""Random ragged batches, and an oracle for them: Python loops over tokens, which share no code with the package.

Every test that needs a batch takes it from here, so that all of them meet the awkward cases: prompts of different
lengths, padding,
unscored spans inside a step, step ids left out, steps whose tokens are all unscored, sequences without any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sspo_ext import backends
from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout


def fused_backends(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    return [b for b in backends.BACKENDS if b != "reference" and backends.why_not(b, device, dtype) is None]


def dtypes_of(backend: str) -> list[torch.dtype]:
    every = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [d for d in every if backends.why_not(backend, "cpu", d) is None]


@dataclass
class Batch:
    logits: Tensor  # (B, T, V)
    labels: Tensor  # (B, T) int64
    step_ids: Tensor  # (B, T) int64
    token_weights: Tensor | None  # (B, T)

    @property
    def layout(self) -> StepLayout:
        return StepLayout.from_step_ids(self.labels, self.step_ids, token_weights=self.token_weights)


def random_batch(
    seed: int, B: int = 4, T: int = 12, V: int = 11, *, weighted: bool = False, dtype: torch.dtype = torch.float32
) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    labels = torch.randint(0, V, (B, T), generator=g)
    step_ids = torch.full((B, T), -1)
    for b in range(B):
        prompt, end = integer(0, max(T // 3, 1)), T - integer(0, max(T // 4, 1))
        step = integer(0, 2) if T > 3 else 0  # starting at 1 leaves step 0 out: an empty step
        for t in range(prompt, end):
            step_ids[b, t] = step
            if integer(0, 4) == 0 and step < T - 3:
                step += 1 + (integer(0, 5) == 0)  # sometimes an id is skipped: an empty step
        labels[b, :prompt] = -100
        labels[b, end:] = -100
        if T > 6 and integer(0, 2):
            labels[b, T // 2 : T // 2 + 2] = -100  # a tool's output inside a step
    weights = None
    if weighted:
        weights = torch.rand(B, T, generator=g) * 2
        weights[torch.rand(B, T, generator=g) < 0.2] = 0.0
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64) * 3
    return Batch(logits.to(dtype), labels, step_ids, weights)


def oracle_steps(batch: Batch, temperature=1.0, softcap=None, scale=1.0) -> tuple[Tensor, list[int], Tensor]:
    """Step sums (S,), counts, and token log-probs (N,) of a batch: float64, one token at a time."""
    labels, ids, weights = batch.labels, batch.step_ids, batch.token_weights
    sums, counts, tokens = [], [], []
    for b in range(len(labels)):
        for step in range(int(ids[b].max()) + 1 if ids.shape[1] else 0):
            total, count = torch.zeros((), dtype=torch.float64), 0
            for t in range(1, labels.shape[1]):
                weight = 1.0 if weights is None else float(weights[b, t])
                if int(ids[b, t]) == step and int(labels[b, t]) != -100 and weight != 0:
                    z = batch.logits[b, t - 1].double() * scale
                    z = z if softcap is None else softcap * torch.tanh(z / softcap)
                    logp = torch.log_softmax(z / temperature, -1)[labels[b, t]]
                    tokens.append(logp)
                    total, count = total + weight * logp, count + 1
            sums.append(total)
            counts.append(count)
    empty = torch.zeros(0, dtype=torch.float64)
    return torch.stack(sums) if sums else empty, counts, torch.stack(tokens) if tokens else empty


def random_pairs(layout: StepLayout, seed: int, P: int | None = None, **values) -> StepPairs:
    """P pairs of different steps, any with any, a step in several pairs."""
    g = torch.Generator().manual_seed(seed)
    S = layout.num_steps
    P = 2 * S if P is None else P
    winner = torch.randint(0, S, (P,), generator=g)
    loser = (winner + 1 + torch.randint(0, S - 1, (P,), generator=g)) % S
    return StepPairs.from_index(layout, torch.stack([winner, loser], 1), **values)


def pack(batch: Batch) -> tuple[Tensor, StepLayout, Tensor, Tensor]:
    """The same sequences without padding, one after the other: logits (total, V), layout, labels (total,), cu_seqlens.

    Steps are given as (S, 2) spans, from a step's first to past its last token. The last position of a sequence is
    followed directly
    by the next sequence's first token: the place where a shift by one leaks.
    """
    logits, labels, weights, spans, cu = [], [], [], [], [0]
    for b in range(len(batch.labels)):
        used = torch.nonzero(batch.step_ids[b] >= 0).flatten()
        length = int(used.max()) + 1 if len(used) else 1
        for step in range(int(batch.step_ids[b].max()) + 1):
            at = torch.nonzero(batch.step_ids[b] == step).flatten()
            previous = spans[-1][1] if spans and spans[-1][1] > cu[-1] else cu[-1]
            spans.append((cu[-1] + int(at[0]), cu[-1] + int(at[-1]) + 1) if len(at) else (previous, previous))
        logits.append(batch.logits[b, :length])
        labels.append(batch.labels[b, :length])
        if batch.token_weights is not None:
            weights.append(batch.token_weights[b, :length])
        cu.append(cu[-1] + length)
    labels, cu = torch.cat(labels), torch.tensor(cu)
    layout = StepLayout.from_offsets(
        labels, cu, torch.tensor(spans).reshape(-1, 2), token_weights=torch.cat(weights) if weights else None
    )
    return torch.cat(logits), layout, labels, cu
