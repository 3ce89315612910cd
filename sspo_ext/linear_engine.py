"""The chunked engine behind the linear route: hidden rows x head weight -> log-probs, loss and gradients; the logits never exist at once.

GEMMs are torch's (cuBLAS, MKL, oneDNN); between them the row kernels of the chosen backend work in place on one reused buffer.
Runs inside `torch.library` ops, below autograd, so it may plan on the host and write into what it likes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import backends
from .plan import Group, LinearPlan, make_plan, rows_per_chunk
from .tensor_parallel import VocabShard


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Head:
    """The LM head of one call, in the dtype its GEMMs run in, with the row kernels that work on its logits."""

    weight: Tensor  # (V, H), or this rank's rows of it
    bias: Tensor | None  # (V,)
    a: float
    c: float
    backend: str
    shard: VocabShard | None
    chunk_rows: int

    def __post_init__(self):
        self.kernels = backends.load(self.backend)
        self.vocab = self.weight.shape[0]
        self.acc_dtype = accumulator(self.weight.dtype)

    def allocate(self, num_rows: int) -> None:
        rows, device = min(self.chunk_rows, num_rows), self.weight.device
        self.buffer = torch.empty((rows, self.vocab), dtype=self.weight.dtype, device=device)
        self.row_ids = torch.arange(rows, device=device)
        self.row_of = self.row_ids.to(torch.int32)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) into the buffer."""
        out = self.buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def logps(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) log-probs and log-sum-exps of a chunk, over the whole vocabulary when this is a shard of it."""
        n = logits.shape[0]
        if self.shard is None:
            return self.kernels.token_logp_fwd(logits[None], self.row_ids[:n], labels, self.a, self.c)
        local = self.shard.local_labels(labels)
        return self.shard.combine(
            *self.kernels.token_logp_fwd(logits[None], self.row_ids[:n], local, self.a, self.c), local
        )

    def to_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, coef: Tensor) -> Tensor:
        """Turns the chunk's logits into d/dlogits, in place."""
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        n = logits.shape[0]
        self.kernels.token_logp_bwd(
            logits[None], self.row_of[:n], labels, lse, coef, None, self.a, self.c, logits[None]
        )
        return logits


class WeightGradient:
    """Sum over chunks of G^T @ hidden: one GEMM straight into place when that loses nothing, else through float32."""

    def __init__(self, head: Head, hidden: int, num_chunks: int, accum_dtype: torch.dtype):
        self.dtype = head.weight.dtype
        exact = num_chunks <= 1 or self.dtype == head.acc_dtype
        acc_dtype = self.dtype if exact else accum_dtype
        make = torch.empty if num_chunks else torch.zeros
        self.total = make((head.vocab, hidden), dtype=acc_dtype, device=head.weight.device)
        self.partial = None if acc_dtype == self.dtype else torch.empty_like(self.total, dtype=self.dtype)
        self.first = True

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.partial is not None:
            torch.mm(gradient.t(), hidden, out=self.partial)
            self.total.copy_(self.partial) if self.first else self.total.add_(self.partial)
        elif self.first:
            torch.mm(gradient.t(), hidden, out=self.total)
        else:
            self.total.addmm_(gradient.t(), hidden)
        self.first = False


@dataclass
class Gradients:
    """What a call accumulates; a field that was not asked for stays empty."""

    hidden: Tensor | None  # (N, H) in the plan's row order
    weight: WeightGradient | None
    bias: Tensor | None  # (V,) float32

    def add(self, head: Head, gradient: Tensor, hidden: Tensor, start: int, end: int) -> None:
        if self.hidden is not None:
            torch.mm(gradient, head.weight, out=self.hidden[start:end])
        if self.weight is not None:
            self.weight.add(gradient, hidden)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))


def start_gradients(head: Head, plan: LinearPlan, bias_gradient: bool, accum_dtype: torch.dtype) -> Gradients:
    device, dtype = head.weight.device, head.weight.dtype
    live = [g for g in plan.groups if g.kind != "logps"]
    rows = plan.num_rows if plan.hidden_gradient else 0
    # rows of steps in no pair stay 0; everything else is overwritten
    make = torch.zeros if any(g.kind == "logps" for g in plan.groups) else torch.empty
    return Gradients(
        make((rows, plan.hidden), dtype=dtype, device=device) if plan.hidden_gradient else None,
        WeightGradient(head, plan.hidden, sum(len(g.chunks) for g in live), accum_dtype)
        if plan.weight_gradient
        else None,
        torch.zeros(head.vocab, dtype=head.acc_dtype, device=device) if bias_gradient else None,
    )


@dataclass
class PairProblem:
    """The pair loss, cut down to the steps of one group. See ops.py for the fields' meaning."""

    weights: Tensor | None  # (N,) token weights in the layout's row order
    ref: Tensor | None
    pair_weights: Tensor | None
    pair_margins: Tensor | None
    pair_labels: Tensor | None
    scale: Tensor
    head: str
    options: list[float]
    label: float
    host_step_offsets: np.ndarray
    host_pair_index: np.ndarray

    def evaluate(
        self, group: Group, logps: Tensor, weights: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, sums, pair losses, d loss/d logp) of a group whose rows are `logps`, steps one after the other."""
        device = logps.device
        counts = np.diff(self.host_step_offsets)[group.steps]
        place = np.zeros(len(self.host_step_offsets) - 1, np.int64)
        place[group.steps] = np.arange(len(group.steps))
        index = place[self.host_pair_index[group.pairs]]
        flat = index.reshape(-1)
        offsets, adjacency = (
            np.concatenate([[0], np.cumsum(c)]) for c in (counts, np.bincount(flat, minlength=len(counts)))
        )

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array.astype(np.int32))).to(device, non_blocking=True)

        def pick(values: Tensor | None, which: np.ndarray) -> Tensor | None:
            if values is None:
                return None
            return values.index_select(0, torch.from_numpy(which).to(device, non_blocking=True)).to(logps.dtype)

        return backends.load(backend).step_loss_fwd(
            logps, weights, tensor(offsets), pick(self.ref, group.steps), tensor(index), tensor(adjacency),
            tensor(np.argsort(flat, kind="stable")), pick(self.pair_weights, group.pairs), pick(self.pair_margins, group.pairs),
            pick(self.pair_labels, group.pairs), self.scale.to(logps.dtype), self.head, self.options, self.label,
        )  # fmt: skip


class Rows:
    """The scored rows in the plan's order: gathered a chunk at a time, never all at once in the GEMM's dtype."""

    def __init__(
        self, hidden: Tensor, rows: Tensor, labels: Tensor, weights: Tensor | None, plan: LinearPlan, dtype: torch.dtype
    ):
        order = None if plan.order is None else torch.from_numpy(plan.order).to(rows.device, non_blocking=True)
        self.order = order
        self.source, self.dtype = hidden, dtype
        self.rows, self.labels, self.weights = (
            t if t is None or order is None else t.index_select(0, order) for t in (rows, labels, weights)
        )

    def chunk(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self.source.index_select(0, self.rows[start:end]).to(self.dtype), self.labels[start:end]

    def restore(self, values: Tensor) -> Tensor:
        """From the plan's row order to the layout's."""
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.order, values)


def run_pref(
    head: Head, rows: Rows, plan: LinearPlan, problem: PairProblem, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), sums (S,), tokens (N,) in the layout's order, pair losses (P,), coef (N,) [frozen plans; else empty]."""
    device, dtype = rows.labels.device, head.acc_dtype
    num_pairs, num_steps = len(problem.host_pair_index), len(problem.host_step_offsets) - 1
    tokens = torch.empty(plan.num_rows, dtype=dtype, device=device)
    lse = torch.empty(plan.num_rows, dtype=torch.float64, device=device)
    sums, pair_losses = (
        torch.zeros(num_steps, dtype=dtype, device=device),
        torch.zeros(num_pairs, dtype=dtype, device=device),
    )
    loss, coef = torch.zeros((), dtype=dtype, device=device), torch.empty(0, dtype=dtype, device=device)
    ones = torch.ones(min(plan.chunk_rows, plan.num_rows), dtype=dtype, device=device)
    head.allocate(plan.num_rows)
    for group in plan.groups:
        for start, end in group.chunks:
            hidden, labels = rows.chunk(start, end)
            logits = head.logits(hidden)
            tokens[start:end], lse[start:end] = head.logps(logits, labels)
            if group.kind == "frozen":
                direction = head.to_gradient(logits, labels, lse[start:end], ones[: end - start])
                gradients.add(head, direction, hidden, start, end)
        span = slice(group.start, group.end)
        weights = None if rows.weights is None else rows.weights[span].to(dtype)
        group_loss, group_sums, group_pairs, group_coef = problem.evaluate(group, tokens[span], weights, head.backend)
        loss += group_loss
        sums[torch.from_numpy(group.steps).to(device)] = group_sums
        pair_losses[torch.from_numpy(group.pairs).to(device)] = group_pairs
        if group.kind == "frozen":
            coef = group_coef
        elif group.kind in ("complete", "recompute"):
            _backward_group(head, rows, group, lse, group_coef, gradients, hidden, labels, logits)
    return loss, sums, rows.restore(tokens), pair_losses, coef


def _backward_group(head, rows, group, lse, coef, gradients, hidden, labels, logits) -> None:
    """Gradients of a group, last chunk first: its logits are still in the buffer."""
    for i, (start, end) in enumerate(reversed(group.chunks)):
        if i:
            hidden, labels = rows.chunk(start, end)
            logits = head.logits(hidden)
        gradient = head.to_gradient(logits, labels, lse[start:end], coef[start - group.start : end - group.start])
        gradients.add(head, gradient, hidden, start, end)


def run_logps(head: Head, rows: Rows, plan: LinearPlan, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """(tokens (N,), lse (N,)); with a frozen plan also the unit gradient direction of each row, into `gradients.hidden`."""
    tokens = torch.empty(plan.num_rows, dtype=head.acc_dtype, device=rows.labels.device)
    lse = torch.empty_like(tokens, dtype=torch.float64)
    ones = tokens.new_ones(min(plan.chunk_rows, plan.num_rows))
    head.allocate(plan.num_rows)
    for group in plan.groups:
        for start, end in group.chunks:
            hidden, labels = rows.chunk(start, end)
            logits = head.logits(hidden)
            tokens[start:end], lse[start:end] = head.logps(logits, labels)
            if group.kind == "frozen":
                gradients.add(
                    head, head.to_gradient(logits, labels, lse[start:end], ones[: end - start]), hidden, start, end
                )
    return tokens, lse


def run_backward(head: Head, rows: Rows, plan: LinearPlan, lse: Tensor, coef: Tensor, gradients: Gradients) -> None:
    """Gradients for d/dlogp known only now: the logits are computed again."""
    head.allocate(plan.num_rows)
    for group in plan.groups:
        for start, end in group.chunks:
            hidden, labels = rows.chunk(start, end)
            gradient = head.to_gradient(head.logits(hidden), labels, lse[start:end], coef[start:end])
            gradients.add(head, gradient, hidden, start, end)


def prepare_head(
    weight: Tensor, bias: Tensor | None, a: float, c: float, backend: str, dtype: torch.dtype, chunk_bytes: int, tp_group: str,
    vocab_start: int,
) -> Head:  # fmt: skip
    """The head in its compute dtype. A weight of another dtype is copied once a call."""
    shard = VocabShard(tp_group, vocab_start, weight.shape[0]) if tp_group else None
    rows = rows_per_chunk(weight.shape[0], dtype, chunk_bytes or None, weight.device.type)
    return Head(weight.to(dtype), None if bias is None else bias.to(dtype), a, c, backend, shard, rows)


def with_gradients(plan: LinearPlan, *, hidden: bool, weight: bool) -> LinearPlan:
    return replace(plan, hidden_gradient=hidden, weight_gradient=weight)


def plan_call(
    host_step_offsets: Tensor, host_pair_index: Tensor, head: Head, hidden: int, needs: tuple[bool, bool, bool]
) -> LinearPlan:
    return make_plan(
        host_step_offsets.numpy(), host_pair_index.numpy(), vocab=head.vocab, hidden=hidden, dtype=head.weight.dtype,
        chunk_rows=head.chunk_rows, hidden_gradient=needs[0], weight_gradient=needs[1], bias_gradient=needs[2],
    )  # fmt: skip
