# SPDX-License-Identifier: Apache-2.0
"""The batches that are measured. They are seeded, so every contestant gets the same one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sspo_ext.layout.pairs import StepPairs
from sspo_ext.layout.steps import StepLayout

BETA = 0.1


def pair_loss(token_logps: Tensor, step_of_row: Tensor, index: Tensor, ref: Tensor) -> Tensor:
    """DPO loss over pairs of steps from token log-probs (N,), in a few torch ops. The peers use it."""
    sums = torch.zeros_like(ref).index_add(0, step_of_row, token_logps.to(ref.dtype))
    winner, loser = (sums - ref)[index.long()].unbind(1)
    return -torch.nn.functional.logsigmoid(BETA * (winner - loser)).mean()


@dataclass(frozen=True)
class LogitsSpec:
    rows: int  # N, all scored
    vocab: int
    dtype: torch.dtype
    step: int = 32  # tokens a step


class LogitsProblem:
    """N scored rows of logits, in one packed sequence.

    Step k of the sequence's first half is preferred to step k of its second half.
    """

    def __init__(self, spec: LogitsSpec, device: str = "cpu"):
        self.spec = spec
        generator = torch.Generator().manual_seed(0)
        total = spec.rows + 1  # a sequence's last position predicts nothing
        self.labels = torch.randint(spec.vocab, (total,), generator=generator)
        edges = torch.arange(1, total, spec.step)
        spans = torch.stack([edges, (edges + spec.step).clamp(max=total)], 1)
        self.layout = StepLayout.from_offsets(self.labels, torch.tensor([0, total]), spans)
        half = self.layout.num_steps // 2
        index = torch.stack([torch.arange(half), torch.arange(half) + half], 1)
        self.pairs = StepPairs.from_index(self.layout, index).to(device)
        self.layout = self.layout.to(device)
        self.ref = torch.randn(self.layout.num_steps, generator=generator).to(device)
        # Row by row: drawing all of it in float32 would itself be the peak of a memory measurement.
        self.logits = torch.empty((total, spec.vocab), dtype=spec.dtype, device=device)
        for row in self.logits:
            row.copy_(torch.randn(spec.vocab, generator=generator))
        self.targets = self.layout.labels

    def leaf(self) -> Tensor:
        """(N + 1, V), sharing the problem's memory."""
        return self.logits.detach().requires_grad_()

    def scored_leaf(self) -> Tensor:
        """(N, V), contiguous, sharing the problem's memory. The peers need no row for the last position."""
        return self.logits[: self.spec.rows].detach().requires_grad_()

    def loss(self, token_logps: Tensor) -> Tensor:
        return pair_loss(token_logps, self.layout.step_of_row, self.pairs.index, self.ref)


@dataclass(frozen=True)
class LinearSpec:
    batch: int  # sequences: the chosen ones, then the rejected ones
    length: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    prompt: float = 0.5  # fraction of each sequence that is not scored
    step: int | None = 32  # tokens a step; None: the whole response is one
    head: str = "trained"  # or "frozen"
    ref: str = "live"  # or "cached": the reference's step sums are known
    chunk_bytes: int | None = None


class LinearProblem:
    """Hidden states and LM heads of a policy and a reference, with DPO pairs between steps of two sequences."""

    def __init__(self, spec: LinearSpec, device: str = "cpu"):
        self.spec = spec
        torch.manual_seed(0)
        shape = (spec.batch, spec.length, spec.hidden)
        labels = torch.randint(spec.vocab, shape[:2])
        first = max(1, round(spec.length * spec.prompt))
        position = torch.arange(spec.length).expand(shape[:2])
        step_ids = (position - first).div(spec.step or spec.length, rounding_mode="floor").clamp(min=-1)
        self.layout = StepLayout.from_step_ids(labels, step_ids, vocab_size=spec.vocab)
        self.pairs = self.layout.pair_by_index().to(device)
        # The peers' labels: shifted, -100 where nothing is scored.
        targets = torch.full(shape[:2], -100)
        targets.view(-1)[self.layout.rows] = self.layout.labels
        self.layout, self.targets = self.layout.to(device), targets.to(device)
        self.hidden, self.ref_hidden = (torch.randn(shape).to(device, spec.dtype) for _ in range(2))
        self.hidden.requires_grad_()
        scale = spec.hidden**-0.5
        live = spec.ref == "live"
        self.weight, self.ref_weight = (
            (torch.randn(rows, spec.hidden) * scale).to(device, spec.dtype) for rows in (spec.vocab, spec.vocab * live)
        )
        self.weight.requires_grad_(spec.head == "trained")
        # near the log-probs of such random logits: the sigmoid is then not saturated
        self.ref = -self.layout.counts.float() * (torch.log(torch.tensor(float(spec.vocab))) + 0.5)

    def loss(self, token_logps: Tensor, ref: Tensor) -> Tensor:
        """From token log-probs (N,) in row order."""
        return pair_loss(token_logps, self.layout.step_of_row, self.pairs.index, ref)

    def sums(self, token_logps: Tensor) -> Tensor:
        return torch.zeros_like(self.ref).index_add(0, self.layout.step_of_row, token_logps.to(self.ref.dtype))

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None
