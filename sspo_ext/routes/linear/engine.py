# SPDX-License-Identifier: Apache-2.0
"""The chunked engine behind the linear route: hidden rows x head weight -> log-probs, loss and gradients.

The logits exist a chunk at a time. GEMMs are torch's (cuBLAS, MKL, oneDNN); between them the row kernels of the chosen
backend work in place on one reused buffer. The engine runs inside `torch.library` ops, below autograd, so it may plan
on the host and write in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import backends
from ...backends.arguments import StepLossArguments
from ...objective.pair import LossTerm, evaluate_terms
from ..kept import KeptRows
from ..tree_rows import add_in_order
from .cache import kept_on_device, to_device
from .gradients import Gradients
from .head import Head
from .plan import Group, LinearPlan
from .step_rows import StepRows


class Rows:
    """The scored rows in the plan's order: gathered a chunk at a time, never all at once in the GEMM's dtype."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Tensor,
        labels: Tensor,
        places: Tensor,  # where each row's gradient is kept: `rows`, unless a position has several
        weights: Tensor | None,
        plan: LinearPlan,
        dtype: torch.dtype,
        kept: tuple[Tensor, Tensor, Tensor] | None = None,  # ids, rows and counts, see HeadCall
    ):
        order, device = plan.order, rows.device
        self.order = None if order is None else kept_on_device(plan, "order", device, lambda: to_device(order, device))
        self.source, self.dtype = hidden, dtype
        self.rows, self.labels = self._ordered(rows), self._ordered(labels)
        self.places = self.rows if places is rows else self._ordered(places)
        self.weights = None if weights is None else self._ordered(weights)
        self.kept = None
        if kept is not None:
            place = None if self.order is None else self.restore(torch.arange(len(rows), device=device))
            self.kept = KeptRows(*kept, order, place)

    def _ordered(self, values: Tensor) -> Tensor:
        """From the layout's row order to the plan's."""
        return values if self.order is None else values.index_select(0, self.order)

    def chunk(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(n, H) hidden states, (n,) labels, (n,) places of the gradients."""
        hidden = self.source.index_select(0, self.rows[start:end]).to(self.dtype)
        return hidden, self.labels[start:end], self.places[start:end]

    def narrow(self, logits: Tensor, start: int, end: int) -> Tensor:
        """The logits of a chunk, -inf at the tokens that its rows have not kept."""
        return logits if self.kept is None else self.kept.narrow(logits, start, end)

    def restore(self, values: Tensor) -> Tensor:
        """From the plan's row order to the layout's."""
        return values if self.order is None else torch.empty_like(values).index_copy_(0, self.order, values)


@dataclass
class PairProblem:
    """The pair loss of a whole call; `evaluate` computes it a group at a time."""

    weights: Tensor | None  # (N,) token weights, in the plan's row order unless tokens share rows
    ref: Tensor | None  # (S,) step sums of the reference
    pair_weights: Tensor | None  # (P,), as are the next three
    pair_margins: Tensor | None
    pair_labels: Tensor | None
    token_pair_weights: Tensor | None
    scale: Tensor  # () multiplies the sum over pairs
    terms: list[LossTerm]
    backend: str

    def prepare(
        self,
        plan: LinearPlan,
        host_step_offsets: np.ndarray,
        host_pair_index: np.ndarray,
        host_row: np.ndarray | None,
        device: torch.device,
    ) -> None:
        """Renumbers each group's steps and pairs from 0; all tables go to the device in two copies, or three."""
        self.num_steps, self.num_pairs = len(host_step_offsets) - 1, len(host_pair_index)
        self.shared = None
        if host_row is not None:
            self.shared = kept_on_device(
                plan, "tokens", device, lambda: _token_tables(plan, host_step_offsets, host_row, device)
            )
        self.tables = kept_on_device(
            plan, "tables", device, lambda: _device_tables(plan.groups, host_step_offsets, host_pair_index, device)
        )

    def evaluate(self, number: int, group: Group, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, sums, pair losses (C, p), d loss/d logp) of a group; `tokens` are log-probs of the plan's rows."""
        steps, pairs, offsets, index, adj_offsets, adj_pairs = self.tables[number]

        def pick(values: Tensor | None, which: Tensor) -> Tensor | None:
            return None if values is None else values.index_select(0, which)

        span, rows, weights = slice(group.start, group.end), None, self.weights
        if self.shared is None:
            logps, weights = tokens[span], None if weights is None else weights[span]
        else:
            which, rows = self.shared[number]
            logps, weights = tokens.index_select(0, rows), pick(weights, which)
        given = StepLossArguments(
            logps, weights, offsets, pick(self.ref, steps), index.view(-1, 2), adj_offsets, adj_pairs,
            pick(self.pair_weights, pairs), pick(self.pair_margins, pairs), pick(self.pair_labels, pairs), self.scale,
            "", [], 1.0,
        )  # fmt: skip
        step_loss_fwd = backends.load(self.backend).step_loss_fwd
        loss, sums, losses, coef = evaluate_terms(
            step_loss_fwd, self.terms, given, pick(self.token_pair_weights, pairs)
        )
        if rows is not None:
            # without pairs all are 0, and rows may be of other groups
            size = group.end - group.start
            coef = add_in_order(coef, rows - group.start, size) if len(group.pairs) else coef.new_zeros(size)
        return loss, sums, losses, coef


def _token_tables(
    plan: LinearPlan, offsets: np.ndarray, row: np.ndarray, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Each group's tokens, step by step, and the places of their rows in the plan's order."""
    place = np.arange(plan.num_rows)
    if plan.order is not None:
        place[plan.order] = np.arange(plan.num_rows)
    step_rows = StepRows(offsets, row)
    tokens = [step_rows.tokens(group.steps) for group in plan.groups]
    lengths = [len(t) for t in tokens for _ in range(2)]
    flat = [values for t in tokens for values in (t, place[row[t]])]
    pieces = to_device(np.concatenate([np.zeros(0, np.int64), *flat]), device).split(lengths)
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def _device_tables(
    groups: list[Group], offsets: np.ndarray, index: np.ndarray, device: torch.device
) -> list[list[Tensor]]:
    """Each group's tables on the device: steps and pairs int64, which index tensors, the others int32."""
    tables = [_group_tables(group, offsets, index) for group in groups]
    on_device = []
    for columns, dtype in ((slice(0, 2), np.int64), (slice(2, 6), np.int32)):
        flat = [table.reshape(-1) for group in tables for table in group[columns]]
        packed = np.concatenate([np.zeros(0, dtype), *flat]).astype(dtype)
        on_device.append(iter(to_device(packed, device).split([len(table) for table in flat])))
    return [
        [next(pieces) for pieces, count in zip(on_device, (2, 4), strict=True) for _ in range(count)] for _ in groups
    ]


def _group_tables(group: Group, offsets: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    """Tables of one group: steps, pairs, then step offsets, pair index and adjacency in the group's own numbering."""
    counts = np.diff(offsets)[group.steps]
    place = np.zeros(len(offsets) - 1, np.int64)
    place[group.steps] = np.arange(len(group.steps))
    own = place[index[group.pairs]]
    flat = own.reshape(-1)
    own_offsets, adj_offsets = (
        np.concatenate([[0], np.cumsum(c)]) for c in (counts, np.bincount(flat, minlength=len(counts)))
    )
    return [group.steps, group.pairs, own_offsets, own, adj_offsets, np.argsort(flat, kind="stable")]


class Chunk(NamedTuple):
    """Scored rows whose logits are in the head's buffer."""

    hidden: Tensor  # (n, H)
    labels: Tensor  # (n,)
    places: Tensor  # (n,) of the gradients
    logits: Tensor  # (n, V)


def compute_chunk(head: Head, rows: Rows, start: int, end: int) -> Chunk:
    """One product: the logits of rows [start, end) of the plan."""
    hidden, labels, places = rows.chunk(start, end)
    return Chunk(hidden, labels, places, rows.narrow(head.logits(hidden), start, end))


def run_pref(
    head: Head, rows: Rows, plan: LinearPlan, problem: PairProblem, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), sums (S,), pair losses (C, P), and coef (N,) = d loss/d logp, in the layout's row order."""
    device, dtype = rows.labels.device, head.acc_dtype
    tokens, coef = (torch.zeros(plan.num_rows, dtype=dtype, device=device) for _ in range(2))
    lse = torch.empty(plan.num_rows, dtype=torch.float64, device=device)
    sums, pair_losses = (
        torch.zeros(size, dtype=dtype, device=device)
        for size in (problem.num_steps, (len(problem.terms), problem.num_pairs))
    )
    loss = torch.zeros((), dtype=dtype, device=device)
    head.allocate(plan)
    for number, group in enumerate(plan.groups):
        in_buffer = None
        for start, end in group.chunks:
            in_buffer = compute_chunk(head, rows, start, end)
            tokens[start:end], lse[start:end] = head.logps(in_buffer.logits, in_buffer.labels)
            if group.kind == "frozen":
                _add_chunk(head, gradients, in_buffer, lse[start:end], None)
        span = slice(group.start, group.end)
        group_loss, group_sums, group_pairs, coef[span] = problem.evaluate(number, group, tokens)
        steps, pairs = problem.tables[number][:2]
        loss += group_loss
        sums.index_copy_(0, steps, group_sums)
        pair_losses.index_copy_(1, pairs, group_pairs)
        if group.kind not in ("complete", "recompute"):
            continue
        for start, end in reversed(group.chunks):  # the last chunk's logits are still in the buffer
            chunk = in_buffer or compute_chunk(head, rows, start, end)
            _add_chunk(head, gradients, chunk, lse[start:end], coef[start:end])
            in_buffer = None
    return loss, sums, pair_losses, rows.restore(coef)


def run_logps(head: Head, rows: Rows, plan: LinearPlan, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """(tokens (N,), lse (N,)); with a frozen plan also d logp/d hidden of each row, into `gradients`."""
    tokens = torch.empty(plan.num_rows, dtype=head.acc_dtype, device=rows.labels.device)
    lse = torch.empty_like(tokens, dtype=torch.float64)
    head.allocate(plan)
    for group in plan.groups:
        for start, end in group.chunks:
            chunk = compute_chunk(head, rows, start, end)
            tokens[start:end], lse[start:end] = head.logps(chunk.logits, chunk.labels)
            if group.kind == "frozen":
                _add_chunk(head, gradients, chunk, lse[start:end], None)
    return tokens, lse


def run_backward(head: Head, rows: Rows, plan: LinearPlan, lse: Tensor, coef: Tensor, gradients: Gradients) -> None:
    """Gradients for a d/dlogp that is known only now: the logits are computed again."""
    head.allocate(plan)
    for group in plan.groups:
        for start, end in group.chunks:
            chunk = compute_chunk(head, rows, start, end)
            _add_chunk(head, gradients, chunk, lse[start:end], coef[start:end])


@dataclass
class Reference:
    """The distribution that kl is taken from: its own head over the same vocabulary, and hidden states of the rows."""

    head: Head
    rows: Rows

    def logits(self, start: int, end: int) -> Tensor:
        """(n, V) into the reference's buffer."""
        return self.rows.narrow(self.head.logits(self.rows.chunk(start, end)[0]), start, end)


def _allocate(head: Head, ref: Reference | None, plan: LinearPlan) -> None:
    head.allocate(plan)
    if ref is not None:
        ref.head.allocate(plan)


def run_reductions(head: Head, rows: Rows, plan: LinearPlan, ref: Reference | None) -> tuple[Tensor, ...]:
    """logp, lse, entropy, sum_p2, kl and the reference's lse; (N,) each, the last two empty without a reference."""
    N, M, acc = plan.num_rows, 0 if ref is None else plan.num_rows, head.acc_dtype
    sizes = ((N, acc), (N, torch.float64), (N, acc), (N, acc), (M, acc), (M, torch.float64))
    out = tuple(torch.empty(size, dtype=dtype, device=rows.labels.device) for size, dtype in sizes)
    _allocate(head, ref, plan)
    for group in plan.groups:
        for start, end in group.chunks:
            chunk = compute_chunk(head, rows, start, end)
            ref_logits = None if ref is None else ref.logits(start, end)
            parts = head.reductions(chunk.logits, chunk.labels, ref_logits)
            for whole, part in zip(out, parts, strict=True):
                if len(whole):
                    whole[start:end] = part
    return out


def run_reductions_backward(
    head: Head,
    rows: Rows,
    plan: LinearPlan,
    ref: Reference | None,
    lse: Tensor,
    ref_lse: Tensor,
    coefs: Tensor,
    gradients: Gradients,
) -> None:
    """Gradients for coefs (N, 5) of `shared.gradient_coefs`: the logits are computed again, the reference's too."""
    _allocate(head, ref, plan)
    for group in plan.groups:
        for start, end in group.chunks:
            chunk = compute_chunk(head, rows, start, end)
            ref_logits = None if ref is None else ref.logits(start, end)
            head.reductions_to_gradient(
                chunk.logits, chunk.labels, lse[start:end], ref_logits, ref_lse[start:end], coefs[start:end]
            )
            gradients.add(head, chunk.logits, chunk.hidden, chunk.places)


def _add_chunk(head: Head, gradients: Gradients, chunk: Chunk, lse: Tensor, coef: Tensor | None) -> None:
    gradient = head.to_gradient(chunk.logits, chunk.labels, lse, coef)
    gradients.add(head, gradient, chunk.hidden, chunk.places)
