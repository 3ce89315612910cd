"""The chunked engine behind the linear route: hidden rows x head weight -> log-probs, loss and gradients; the logits
never exist at once.

GEMMs are torch's (cuBLAS, MKL, oneDNN); between them the row kernels of the chosen backend work in place on one reused
buffer. Runs inside `torch.library` ops, below autograd, so it may plan on the host and write into what it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import backends
from .plan import Group, LinearPlan
from .tensor_parallel import VocabShard
from .terms import LossTerm, evaluate_terms

_BLOCK_BYTES = 4 << 20  # temporaries of the gradients' reductions: near the size of a core's cache


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

    def __post_init__(self):
        self.kernels = backends.load(self.backend)
        self.vocab = self.weight.shape[0]
        self.acc_dtype = accumulator(self.weight.dtype)

    def allocate(self, plan: LinearPlan) -> None:
        rows, device = min(plan.chunk_rows, plan.num_rows), self.weight.device
        self.buffer = self.empty((rows, self.vocab), self.weight.dtype)
        self.row_ids = torch.arange(rows, device=device)
        self.row_of = self.row_ids.to(torch.int32)
        self.ones = torch.ones(rows, dtype=self.acc_dtype, device=device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.backend == "cpu":
            return self.kernels.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) into the buffer."""
        out = self.buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def logps(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) log-probs and log-sum-exps of a chunk, over the whole vocabulary when this is a shard of it."""
        row_ids = self.row_ids[: logits.shape[0]]
        if self.shard is None:
            return self.kernels.token_logp_fwd(logits[None], row_ids, labels, self.a, self.c)
        local = self.shard.local_labels(labels)
        logps, lse = self.kernels.token_logp_fwd(logits[None], row_ids, local, self.a, self.c)
        return self.shard.combine(logps, lse, local)

    def to_gradient(self, logits: Tensor, labels: Tensor, lse: Tensor, coef: Tensor | None) -> Tensor:
        """Turns the chunk's logits into d/dlogits, in place; without `coef`, d logp/dlogits."""
        n = logits.shape[0]
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        coef = self.ones[:n] if coef is None else coef
        row_of, out = self.row_of[:n], logits[None]
        self.kernels.token_logp_bwd(out, row_of, labels, lse, coef, None, self.a, self.c, out)
        return logits

    def reductions(
        self, logits: Tensor, labels: Tensor, ref_logits: Tensor | None, sum_p2: bool = True
    ) -> tuple[Tensor, ...]:
        """`row_reductions_fwd` of a chunk, over the whole vocabulary when this is a shard of it."""
        row_ids, a, c = self.row_ids[: logits.shape[0]], self.a, self.c
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        ref = None if ref_logits is None else ref_logits[None]
        parts = self.kernels.row_reductions_fwd(logits[None], row_ids, labels, ref, a, c, True, sum_p2)
        if self.shard is None:
            return parts
        if ref is not None:  # where the policy has no probability in a shard, its kernel looks no further
            parts = (*parts[:-1], self.kernels.token_logp_fwd(ref, row_ids, labels, a, c)[1])
        return self.shard.combine_reductions(*parts, labels)

    def reductions_to_gradient(
        self, logits: Tensor, labels: Tensor, lse: Tensor, ref_logits: Tensor | None, ref_lse: Tensor, coefs: Tensor
    ) -> None:
        """Turns the chunk's logits into d/dlogits for coefs (n, 5), see reductions.py, in place."""
        labels = labels if self.shard is None else self.shard.local_labels(labels)
        ref, out = None if ref_logits is None else ref_logits[None], logits[None]
        row_of = self.row_of[: logits.shape[0]]
        self.kernels.row_reductions_bwd(out, row_of, labels, lse, ref, ref_lse, coefs, self.a, self.c, out)


class WeightGradient:
    """Sum over chunks of G^T @ hidden. A 16-bit sum of several products goes through float32, a block of vocabulary
    rows at a time, so that no second (V, H) exists; otherwise GEMMs add straight into place."""

    def __init__(self, head: Head, plan: LinearPlan, accum_dtype: torch.dtype):
        weight, chunks = head.weight, plan.weight_chunks
        exact = chunks <= 1 or weight.dtype == head.acc_dtype
        self.total = head.empty(tuple(weight.shape), weight.dtype if exact else accum_dtype)
        if not chunks:
            self.total.zero_()
        self.first = True
        self.straight = weight.dtype == head.acc_dtype
        # oneDNN multiplies a transposed 16-bit operand at half its speed; turning a block of it round is cheaper
        self.transposed = head.kernels.transposed if head.backend == "cpu" and not self.straight else None
        widest = max(1, weight.shape[1], min(plan.chunk_rows, plan.num_rows))
        self.block = max(1, min(_BLOCK_BYTES, plan.buffer_bytes) // (widest * weight.itemsize))
        self.scratch = (
            None if self.transposed is None else weight.new_empty(self.block * min(plan.chunk_rows, plan.num_rows))
        )

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.straight:
            torch.mm(gradient.t(), hidden, out=self.total) if self.first else self.total.addmm_(gradient.t(), hidden)
        else:
            for start in range(0, self.total.shape[0], self.block):
                total, part = self.total[start : start + self.block], gradient[:, start : start + self.block]
                part = part.t() if self.transposed is None else self.transposed(part, self.scratch)
                if self.first and total.dtype == part.dtype:
                    torch.mm(part, hidden, out=total)
                elif self.first:
                    total.copy_(torch.mm(part, hidden))
                else:
                    total.add_(torch.mm(part, hidden))
        self.first = False


@dataclass
class Gradients:
    """What a call accumulates; a field that was not asked for is None."""

    hidden: Tensor | None  # (N0, H), zeros where nothing is scored
    weight: WeightGradient | None
    bias: Tensor | None  # (V,) float32

    def add(self, head: Head, gradient: Tensor, hidden: Tensor, rows: Tensor) -> None:
        """A chunk's d/dlogits (n, V), hidden states (n, H) and their rows (n,) of the batch."""
        if self.hidden is not None:
            d_hidden = torch.mm(gradient, head.weight)
            if head.shard is not None:
                d_hidden = head.shard.all_reduce(d_hidden.to(head.acc_dtype))
            self.hidden.index_copy_(0, rows, d_hidden.to(self.hidden.dtype))
        if self.weight is not None:
            self.weight.add(gradient, hidden)
        if self.bias is not None:
            # a block of columns at a time, because a sum in a wider dtype may first copy what it sums
            budget = min(_BLOCK_BYTES, gradient.nbytes)
            block = max(1, budget // (max(1, len(rows)) * self.bias.itemsize))
            for v in range(0, head.vocab, block):
                self.bias[v : v + block] += gradient[:, v : v + block].sum(0, dtype=self.bias.dtype)


def start_gradients(
    head: Head, plan: LinearPlan, hidden: Tensor, hidden_dtype: torch.dtype, accum_dtype: torch.dtype
) -> Gradients:
    device = head.weight.device
    return Gradients(
        torch.zeros(hidden.shape, dtype=hidden_dtype, device=device) if plan.hidden_gradient else None,
        WeightGradient(head, plan, accum_dtype) if plan.weight_gradient else None,
        torch.zeros(head.vocab, dtype=head.acc_dtype, device=device) if plan.bias_gradient else None,
    )


class Rows:
    """The scored rows in the plan's order: gathered a chunk at a time, never all at once in the GEMM's dtype."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        plan: LinearPlan,
        dtype: torch.dtype,
    ):
        self.order = None if plan.order is None else torch.from_numpy(plan.order).to(rows.device, non_blocking=True)
        self.source, self.dtype = hidden, dtype
        self.rows, self.labels, self.weights = (
            t if t is None or self.order is None else t.index_select(0, self.order) for t in (rows, labels, weights)
        )

    def chunk(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(n, H) hidden states, (n,) labels, (n,) rows of the batch."""
        rows = self.rows[start:end]
        return self.source.index_select(0, rows).to(self.dtype), self.labels[start:end], rows

    def restore(self, values: Tensor) -> Tensor:
        """From the plan's row order to the layout's."""
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)


@dataclass
class PairProblem:
    """The pair loss of a whole call; `evaluate` takes it a group at a time. See ops.py for the fields."""

    weights: Tensor | None  # (N,) token weights in the plan's row order
    ref: Tensor | None
    pair_weights: Tensor | None
    pair_margins: Tensor | None
    pair_labels: Tensor | None
    token_pair_weights: Tensor | None
    scale: Tensor
    terms: list[LossTerm]
    backend: str

    def prepare(
        self, plan: LinearPlan, host_step_offsets: np.ndarray, host_pair_index: np.ndarray, device: torch.device
    ) -> None:
        """Renumbers each group's steps and pairs from 0; all tables go to the device in one copy."""
        tables = [_group_tables(group, host_step_offsets, host_pair_index) for group in plan.groups]
        flat = [table.reshape(-1) for group in tables for table in group]
        packed = np.concatenate([np.zeros(0, np.int32), *flat]).astype(np.int32)
        pieces = iter(torch.from_numpy(packed).to(device, non_blocking=True).split([len(t) for t in flat]))
        self.tables = [[next(pieces) for _ in group] for group in tables]

    def evaluate(self, number: int, group: Group, logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, sums, pair losses (C, p), d loss/d logp) of a group with rows `logps`, steps one after the other."""
        steps, pairs, offsets, index, adj_offsets, adj_pairs = self.tables[number]

        def pick(values: Tensor | None, which: Tensor) -> Tensor | None:
            return None if values is None else values.index_select(0, which)

        return evaluate_terms(
            backends.load(self.backend).step_loss_fwd,
            self.terms,
            logps,
            None if self.weights is None else self.weights[group.start : group.end],
            offsets,
            pick(self.ref, steps),
            index.view(-1, 2),
            adj_offsets,
            adj_pairs,
            pick(self.pair_weights, pairs),
            pick(self.token_pair_weights, pairs),
            pick(self.pair_margins, pairs),
            pick(self.pair_labels, pairs),
            self.scale,
        )


def _group_tables(group: Group, offsets: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    """steps, pairs, step offsets, pair index, and the pairs each step is in, of one group, in its own numbering."""
    counts = np.diff(offsets)[group.steps]
    place = np.zeros(len(offsets) - 1, np.int64)
    place[group.steps] = np.arange(len(group.steps))
    own = place[index[group.pairs]]
    flat = own.reshape(-1)
    own_offsets, adj_offsets = (
        np.concatenate([[0], np.cumsum(c)]) for c in (counts, np.bincount(flat, minlength=len(counts)))
    )
    return [group.steps, group.pairs, own_offsets, own, adj_offsets, np.argsort(flat, kind="stable")]


def run_pref(
    head: Head, rows: Rows, plan: LinearPlan, problem: PairProblem, gradients: Gradients, num_steps: int, num_pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), sums (S,), pair losses (C, P), and coef (N,) = d loss/d logp, in the layout's row order."""
    device, dtype = rows.labels.device, head.acc_dtype
    tokens, coef = (torch.zeros(plan.num_rows, dtype=dtype, device=device) for _ in range(2))
    lse = torch.empty(plan.num_rows, dtype=torch.float64, device=device)
    sums, pair_losses = (
        torch.zeros(size, dtype=dtype, device=device) for size in (num_steps, (len(problem.terms), num_pairs))
    )
    loss = torch.zeros((), dtype=dtype, device=device)
    head.allocate(plan)
    for number, group in enumerate(plan.groups):
        for start, end in group.chunks:
            chunk = rows.chunk(start, end)
            logits = head.logits(chunk[0])
            tokens[start:end], lse[start:end] = head.logps(logits, chunk[1])
            if group.kind == "frozen":
                _add_chunk(head, gradients, chunk, logits, lse[start:end], None)
        span = slice(group.start, group.end)
        group_loss, group_sums, group_pairs, coef[span] = problem.evaluate(number, group, tokens[span])
        steps, pairs = problem.tables[number][:2]
        loss += group_loss
        sums.index_copy_(0, steps.long(), group_sums)
        pair_losses.index_copy_(1, pairs.long(), group_pairs)
        if group.kind not in ("complete", "recompute"):
            continue
        for i, (start, end) in enumerate(reversed(group.chunks)):
            if i:  # the last chunk's logits are still in the buffer
                chunk = rows.chunk(start, end)
                logits = head.logits(chunk[0])
            _add_chunk(head, gradients, chunk, logits, lse[start:end], coef[start:end])
    return loss, sums, pair_losses, rows.restore(coef)


def run_logps(head: Head, rows: Rows, plan: LinearPlan, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """(tokens (N,), lse (N,)); with a frozen plan also d logp/d hidden of each row, into `gradients`."""
    tokens = torch.empty(plan.num_rows, dtype=head.acc_dtype, device=rows.labels.device)
    lse = torch.empty_like(tokens, dtype=torch.float64)
    head.allocate(plan)
    for group in plan.groups:
        for start, end in group.chunks:
            chunk = rows.chunk(start, end)
            logits = head.logits(chunk[0])
            tokens[start:end], lse[start:end] = head.logps(logits, chunk[1])
            if group.kind == "frozen":
                _add_chunk(head, gradients, chunk, logits, lse[start:end], None)
    return tokens, lse


def run_backward(head: Head, rows: Rows, plan: LinearPlan, lse: Tensor, coef: Tensor, gradients: Gradients) -> None:
    """Gradients for d/dlogp known only now: the logits are computed again."""
    head.allocate(plan)
    for group in plan.groups:
        for start, end in group.chunks:
            chunk = rows.chunk(start, end)
            _add_chunk(head, gradients, chunk, head.logits(chunk[0]), lse[start:end], coef[start:end])


@dataclass
class Reference:
    """The distribution that kl is taken from: its own head over the same vocabulary, and hidden states of the rows."""

    head: Head
    rows: Rows

    def logits(self, start: int, end: int) -> Tensor:
        """(n, V) into the reference's buffer."""
        return self.head.logits(self.rows.chunk(start, end)[0])


def _allocate(head: Head, ref: Reference | None, plan: LinearPlan) -> None:
    head.allocate(plan)
    if ref is not None:
        ref.head.allocate(plan)


def run_reductions(head: Head, rows: Rows, plan: LinearPlan, ref: Reference | None) -> tuple[Tensor, ...]:
    """logp, lse, entropy, sum_p2, kl and the reference's lse; (N,) each, the last two empty without a reference."""
    N, M, device = plan.num_rows, 0 if ref is None else plan.num_rows, rows.labels.device
    sizes = (
        (N, head.acc_dtype),
        (N, torch.float64),
        *[(N, head.acc_dtype)] * 2,
        (M, head.acc_dtype),
        (M, torch.float64),
    )
    out = tuple(torch.empty(size, dtype=dtype, device=device) for size, dtype in sizes)
    _allocate(head, ref, plan)
    for group in plan.groups:
        for start, end in group.chunks:
            hidden, labels, _ = rows.chunk(start, end)
            ref_logits = None if ref is None else ref.logits(start, end)
            parts = head.reductions(head.logits(hidden), labels, ref_logits)
            for whole, part in zip(out, parts, strict=True):
                if len(whole):
                    whole[start:end] = part
    return out


def run_reductions_backward(
    head: Head, rows: Rows, plan: LinearPlan, ref: Reference | None, lse: Tensor, ref_lse: Tensor, coefs: Tensor,
    gradients: Gradients,
) -> None:  # fmt: skip
    """Gradients for coefs (N, 5), see reductions.py: the logits are computed again, the reference's too."""
    _allocate(head, ref, plan)
    for group in plan.groups:
        for start, end in group.chunks:
            hidden, labels, places = rows.chunk(start, end)
            logits, ref_logits = head.logits(hidden), None if ref is None else ref.logits(start, end)
            head.reductions_to_gradient(
                logits, labels, lse[start:end], ref_logits, ref_lse[start:end], coefs[start:end]
            )
            gradients.add(head, logits, hidden, places)


def _add_chunk(
    head: Head,
    gradients: Gradients,
    chunk: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    lse: Tensor,
    coef: Tensor | None,
) -> None:
    hidden, labels, rows = chunk
    gradients.add(head, head.to_gradient(logits, labels, lse, coef), hidden, rows)
