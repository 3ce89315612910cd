"""The schedule of the linear route: which rows share a chunk, and how many GEMMs each costs. Made on the host, before
any work.

A GEMM is N x H x V. Without gradients a row costs one (its logits); with a frozen head two, since d loss/d hidden is a
scalar times a direction known at once; with a trained head three, when its unit fits in a chunk, because the head's
derivative is then known while the chunk's logits are still there; only a unit larger than the budget is computed twice
(four). A step in no pair has no gradient and costs one. Where entropy, sum_p2 or kl are asked for beside the log-probs,
a gradient is known only in backward, with a frozen head too: three with a frozen head, four with a trained one; the
reference's logits for kl are a product of their own (N x H of the reference x V) in each direction. In float16 the
gradients of a trained head wait for the caller's loss scale, and so are always made in backward (four).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ...layout.pairs import StepPairs, connected_steps
from ...layout.steps import StepLayout
from ...objective.policy import segments_of

# Enough rows for a GEMM to run at speed at vocabularies of 150k, small beside any model with such a head.
DEFAULT_CHUNK_BYTES = {"cpu": 128 << 20}

_OTHER_DEVICES = 512 << 20


def rows_per_chunk(vocab: int, dtype: torch.dtype, chunk_bytes: int | None, device_type: str) -> int:
    """Rows whose (rows, V) logits fit in the budget; at least one."""
    budget = DEFAULT_CHUNK_BYTES.get(device_type, _OTHER_DEVICES) if chunk_bytes is None else chunk_bytes
    return max(1, budget // (max(vocab, 1) * dtype.itemsize))


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are worked on together: their steps' losses depend on each other and on no step outside.

    kind: "logps" (logits only), "frozen" (logits and direction), "complete" (the head's derivative is known inside the
    one chunk), "recompute" (all log-probs first, then the chunks again), "later" (gradients known only in backward).
    """

    kind: str
    start: int  # its rows are [start, end) of the plan's row order
    end: int
    chunks: list[tuple[int, int]]  # of rows, in the plan's order
    steps: np.ndarray = field(repr=False)  # the layout's steps, in the order their rows stand
    pairs: np.ndarray = field(repr=False)  # indices of pairs


@dataclass(frozen=True, eq=False)
class LinearPlan:
    """What a call of the linear route is about to do. `print(plan)` shows it."""

    order: np.ndarray | None = field(repr=False)  # (N,) the layout's row at each place; None when they keep their order
    groups: list[Group] = field(repr=False)
    chunk_rows: int
    num_rows: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    hidden_gradient: bool
    weight_gradient: bool
    bias_gradient: bool

    @property
    def gemm_rows(self) -> int:
        """Rows times the GEMMs they enter."""
        total, gradients = 0, self.weight_gradient + self.hidden_gradient
        for group in self.groups:
            rows = group.end - group.start
            total += rows * {"logps": 1, "frozen": 2, "complete": 1 + gradients}.get(group.kind, 2 + gradients)
            if group.kind == "recompute":
                # the last chunk's logits are still in the buffer when the backward sweep starts with it
                start, end = group.chunks[-1]
                total -= end - start
        return total

    @property
    def flops(self) -> int:
        return 2 * self.hidden * self.vocab * self.gemm_rows

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the reused logits buffer."""
        return min(self.chunk_rows, max(self.num_rows, 1)) * self.vocab * self.dtype.itemsize

    @property
    def weight_chunks(self) -> int:
        """Products that the weight's gradient is the sum of."""
        return sum(len(group.chunks) for group in self.groups if group.kind != "logps")

    def __str__(self) -> str:
        kinds: dict[str, tuple[int, int]] = {}
        for group in self.groups:
            rows, chunks = kinds.get(group.kind, (0, 0))
            kinds[group.kind] = (rows + group.end - group.start, chunks + len(group.chunks))
        parts = [
            f"{kind}: {rows} rows in {chunks} chunk{'s' * (chunks != 1)}" for kind, (rows, chunks) in kinds.items()
        ]
        per_row = self.gemm_rows / self.num_rows if self.num_rows else 0.0
        return (
            f"{self.num_rows} rows x H {self.hidden} x V {self.vocab} ({str(self.dtype).removeprefix('torch.')}), "
            f"at most {self.chunk_rows} rows a chunk; {', '.join(parts) or 'nothing to do'}; "
            f"{per_row:.2f} GEMMs a row, {self.flops / 1e9:.2f} GFLOP, buffer {self.buffer_bytes / 2**20:.1f} MiB"
        )


def make_plan(
    host_step_offsets: np.ndarray,  # (S + 1,)
    host_pair_index: np.ndarray | None,  # (P, 2); None: gradients of single steps, known only in backward
    *,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    chunk_rows: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    reductions: bool = False,
) -> LinearPlan:
    num_rows, num_steps = int(host_step_offsets[-1]), len(host_step_offsets) - 1
    trained = weight_gradient or bias_gradient
    order = None
    if host_pair_index is None or not (hidden_gradient or trained):
        later = trained or (reductions and hidden_gradient)
        kind = "later" if later else "frozen" if hidden_gradient else "logps"
        pairs = np.arange(0 if host_pair_index is None else len(host_pair_index))
        groups = [Group(kind, 0, num_rows, cut_evenly(0, num_rows, chunk_rows), np.arange(num_steps), pairs)]
    else:
        order, groups = _groups_by_unit(host_step_offsets, host_pair_index, chunk_rows, frozen=not trained)
    return LinearPlan(
        order, groups, chunk_rows, num_rows, vocab, hidden, dtype, hidden_gradient, weight_gradient, bias_gradient
    )


def _groups_by_unit(
    offsets: np.ndarray, index: np.ndarray, chunk_rows: int, frozen: bool
) -> tuple[np.ndarray, list[Group]]:
    """Rows ordered by unit, whole units packed into chunks first fit in order; a unit larger than a chunk stands alone.
    With a frozen head all units are one group, since their chunks may be cut anywhere. Steps in no pair come last."""
    counts = np.diff(offsets)
    # a pair with an empty step is no part of the loss, so it ties no steps together
    live_pairs = np.flatnonzero((counts[index] > 0).all(axis=1)) if len(index) else np.zeros(0, np.int64)
    unit = connected_steps(index[live_pairs], len(counts))
    steps_of: dict[int, list[int]] = {}
    for step, u in enumerate(unit.tolist()):
        steps_of.setdefault(u, []).append(step)
    pairs_of: dict[int, list[int]] = {}
    for pair in live_pairs.tolist():
        pairs_of.setdefault(int(unit[index[pair, 0]]), []).append(pair)

    groups: list[Group] = []
    placed: list[int] = []  # steps in order
    at = 0

    def add(kind: str, steps: list[int], pairs: list[int]) -> None:
        nonlocal at
        end = at + int(counts[steps].sum())
        if end > at:
            cut = cut_evenly(at, end, chunk_rows)
            groups.append(Group(kind, at, end, cut, np.array(steps), np.array(pairs, np.int64)))
        placed.extend(steps)
        at = end

    loose = steps_of.pop(-1, [])
    if frozen:
        add("frozen", [s for members in steps_of.values() for s in members], live_pairs.tolist())
        steps_of = {}
    steps, pairs, filled = [], [], 0
    for u, members in steps_of.items():
        size = int(counts[members].sum())
        if size > chunk_rows:
            add("recompute", members, pairs_of[u])
            continue
        if filled + size > chunk_rows:
            add("complete", steps, pairs)
            steps, pairs, filled = [], [], 0
        steps += members
        pairs += pairs_of[u]
        filled += size
    add("complete", steps, pairs)
    add("logps", loose, [])
    rows = [np.arange(offsets[s], offsets[s + 1]) for s in placed]
    return np.concatenate(rows) if rows else np.zeros(0, np.int64), groups


def cut_evenly(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """[start, end) in the fewest chunks of at most `size`, as even as they can be."""
    count = -(-(end - start) // size)
    edges = np.linspace(start, end, count + 1).round().astype(int).tolist() if count else [start]
    return list(zip(edges[:-1], edges[1:], strict=True))


def plan_for(
    layout: StepLayout,
    pairs: StepPairs | None,
    *,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    reductions: bool,
) -> LinearPlan:
    late = dtype == torch.float16 and (weight_gradient or bias_gradient)
    return make_plan(
        layout.host_step_offsets.numpy(),
        None if pairs is None or late else pairs.host_index.numpy(),
        vocab=vocab,
        hidden=hidden,
        dtype=dtype,
        chunk_rows=rows_per_chunk(vocab, dtype, chunk_bytes, layout.device.type),
        hidden_gradient=hidden_gradient,
        weight_gradient=weight_gradient,
        bias_gradient=bias_gradient,
        reductions=reductions,
    )


def make_policy_plan(
    host_unit_offsets: np.ndarray | None,  # (U + 1,) rows of the units, one after the other; None: each row is one
    *,
    num_rows: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    chunk_rows: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> LinearPlan:
    """Groups of whole units that fit in a chunk, in the layout's order; a larger unit stands alone and is computed
    twice."""
    nothing = np.zeros(0, np.int64)

    def group(kind: str, start: int, end: int) -> Group:
        return Group(kind, start, end, cut_evenly(start, end, chunk_rows), nothing, nothing)

    if not (hidden_gradient or weight_gradient or bias_gradient):
        groups = [group("logps", 0, num_rows)]
    elif host_unit_offsets is None:
        groups = [group("complete", start, end) for start, end in cut_evenly(0, num_rows, chunk_rows)]
    else:
        groups, start = [], 0
        ends = host_unit_offsets[1:].tolist()
        for end, after in zip(ends, [*ends, None][1:], strict=True):
            # close the group when it is too large already, or the next unit would make it so
            if end > start and (after is None or after - start > chunk_rows):
                groups.append(group("complete" if end - start <= chunk_rows else "recompute", start, end))
                start = end
    return LinearPlan(
        None, groups, chunk_rows, num_rows, vocab, hidden, dtype, hidden_gradient, weight_gradient, bias_gradient
    )


def pref_plan(
    layout: StepLayout,
    pairs: StepPairs | None = None,
    *,
    vocab: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = False,
    logps_only: bool = False,
    reductions: bool = False,
) -> LinearPlan:
    """What `linear_step_pref_loss` will do with this batch: rows, chunks, GEMMs, FLOPs, bytes. Print it.

    Args:
        layout: the batch's StepLayout.
        pairs: default pair by index, as there.
        vocab: V, rows of the head's weight.
        hidden: H, columns of the head's weight.
        dtype: the dtype that GEMMs run in.
        chunk_bytes: budget of the logits buffer, bytes; default as there.
        hidden_gradient: whether the hidden states want a gradient.
        weight_gradient: whether the head's weight wants a gradient.
        bias_gradient: whether the head's bias wants a gradient.
        logps_only: plan `linear_step_logps` instead.
        reductions: plan `linear_step_logps` with entropy, sum_p2 or kl (for kl without the reference's own products).
    """
    logps_only = logps_only or reductions
    if pairs is None and not logps_only:
        pairs = layout.pair_by_index()
    return plan_for(
        layout, None if logps_only else pairs, vocab=vocab, hidden=hidden, dtype=dtype, chunk_bytes=chunk_bytes,
        hidden_gradient=hidden_gradient, weight_gradient=weight_gradient, bias_gradient=bias_gradient,
        reductions=reductions,
    )  # fmt: skip


def policy_plan(
    layout: StepLayout,
    *,
    importance_sampling_level: str = "token",
    vocab: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = False,
) -> LinearPlan:
    """What `linear_step_policy_loss` will do with a trained head: rows, chunks, GEMMs, FLOPs, bytes. Print it."""
    if dtype == torch.float16:
        return plan_for(
            layout, None, vocab=vocab, hidden=hidden, dtype=dtype, chunk_bytes=chunk_bytes,
            hidden_gradient=hidden_gradient, weight_gradient=weight_gradient, bias_gradient=bias_gradient,
            reductions=False,
        )  # fmt: skip
    offsets = None
    if importance_sampling_level != "token":
        offsets = segments_of(layout, importance_sampling_level).host_offsets.numpy()
    return make_policy_plan(
        offsets, num_rows=layout.num_rows, vocab=vocab, hidden=hidden, dtype=dtype,
        chunk_rows=rows_per_chunk(vocab, dtype, chunk_bytes, layout.device.type), hidden_gradient=hidden_gradient,
        weight_gradient=weight_gradient, bias_gradient=bias_gradient,
    )  # fmt: skip
