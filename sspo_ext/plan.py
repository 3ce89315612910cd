"""The schedule of the linear route: which rows share a chunk, and how many GEMMs each costs. Made on the host, before any work.

A GEMM is N x H x V. Without gradients a row costs one (its logits); with a frozen head two, since d loss/d hidden is a scalar times a
direction known at once; with a trained head three, when its unit fits in a chunk, because the head's derivative is then known while
the chunk's logits are still there; only a unit larger than the budget is computed twice (four).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .pairs import connected_steps

if TYPE_CHECKING:
    from .layout import StepLayout
    from .pairs import StepPairs

# Enough rows for a GEMM to run at speed at vocabularies of 150k, small beside the weights of any model with such a head.
DEFAULT_CHUNK_BYTES = {"cpu": 128 << 20}
_OTHER_DEVICES = 512 << 20


def rows_per_chunk(vocab: int, dtype: torch.dtype, chunk_bytes: int | None, device_type: str) -> int:
    """Rows whose (rows, V) logits fit in the budget; at least one."""
    budget = DEFAULT_CHUNK_BYTES.get(device_type, _OTHER_DEVICES) if chunk_bytes is None else chunk_bytes
    return max(1, budget // (max(vocab, 1) * dtype.itemsize))


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are worked on together: their steps' losses depend on each other and on no step outside."""

    kind: str  # "logps": logits only; "frozen": logits and direction; "complete": head known inside the one chunk; "recompute"
    start: int  # its rows are [start, end) of the plan's row order
    end: int
    chunks: list[tuple[int, int]]  # of rows, in the plan's order
    steps: np.ndarray = field(repr=False)  # the layout's steps, in the order their rows stand
    pairs: np.ndarray = field(repr=False)  # indices of pairs


@dataclass(frozen=True, eq=False)
class LinearPlan:
    """What `linear_step_pref_loss` is about to do. `print(plan)` shows it."""

    order: np.ndarray | None = field(repr=False)  # (N,) the layout's row at each place; None when they keep their order
    groups: list[Group] = field(repr=False)
    chunk_rows: int
    num_rows: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    weight_gradient: bool
    hidden_gradient: bool
    weight_bytes_per_element: int = field(repr=False)

    def gemm_rows(self) -> int:
        """Rows times GEMMs they enter: the plan's FLOPs are 2 * H * V * gemm_rows()."""
        total = 0
        for group in self.groups:
            rows = group.end - group.start
            gradients = {"logps": 0, "frozen": 1}.get(group.kind, self.weight_gradient + self.hidden_gradient)
            total += rows * (1 + gradients)
            if group.kind == "recompute":
                # the last chunk's logits are still in the buffer when the backward sweep starts with it
                total += rows - (group.chunks[-1][1] - group.chunks[-1][0])
        return total

    @property
    def flops(self) -> int:
        return 2 * self.hidden * self.vocab * self.gemm_rows()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the reused logits buffer."""
        return min(self.chunk_rows, max(self.num_rows, 1)) * self.vocab * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients kept until backward."""
        hidden = self.num_rows * self.hidden * self.dtype.itemsize * self.hidden_gradient
        return hidden + self.vocab * self.hidden * self.weight_bytes_per_element * self.weight_gradient

    def __str__(self) -> str:
        kinds = {}
        for group in self.groups:
            rows, chunks = kinds.get(group.kind, (0, 0))
            kinds[group.kind] = (rows + group.end - group.start, chunks + len(group.chunks))
        parts = ", ".join(
            f"{kind}: {rows} rows in {chunks} chunk{'s' * (chunks != 1)}" for kind, (rows, chunks) in kinds.items()
        )
        per_row = self.gemm_rows() / self.num_rows if self.num_rows else 0.0
        return (
            f"{self.num_rows} rows x H {self.hidden} x V {self.vocab} ({str(self.dtype).removeprefix('torch.')}), "
            f"at most {self.chunk_rows} rows a chunk; {parts or 'nothing to do'}; {per_row:.2f} GEMMs a row, {self.flops / 1e9:.2f} GFLOP, "
            f"buffer {self.buffer_bytes / 2**20:.1f} MiB, gradients {self.gradient_bytes / 2**20:.1f} MiB"
        )


def make_plan(
    host_step_offsets: np.ndarray,  # (S + 1,)
    host_pair_index: np.ndarray,  # (P, 2)
    *,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    chunk_rows: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    weight_bytes_per_element: int = 4,
) -> LinearPlan:
    num_rows, num_steps = int(host_step_offsets[-1]), len(host_step_offsets) - 1
    all_pairs = np.arange(len(host_pair_index))
    order = None
    if weight_gradient or bias_gradient:
        order, groups = _groups_by_unit(host_step_offsets, host_pair_index, chunk_rows)
    else:
        kind = "frozen" if hidden_gradient else "logps"
        groups = [Group(kind, 0, num_rows, _cut(0, num_rows, chunk_rows), np.arange(num_steps), all_pairs)]
    return LinearPlan(
        order,
        groups,
        chunk_rows,
        num_rows,
        vocab,
        hidden,
        dtype,
        weight_gradient,
        hidden_gradient,
        weight_bytes_per_element,
    )


def _groups_by_unit(offsets: np.ndarray, index: np.ndarray, chunk_rows: int) -> tuple[np.ndarray, list[Group]]:
    """Rows ordered by unit, whole units packed into chunks first fit in order; a unit larger than a chunk stands alone."""
    counts = np.diff(offsets)
    # a pair with an empty step is no part of the loss, so it ties no steps together
    live = (counts[index] > 0).all(axis=1) if len(index) else np.zeros(0, bool)
    live_pairs = np.flatnonzero(live)
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
            groups.append(Group(kind, at, end, _cut(at, end, chunk_rows), np.array(steps), np.array(pairs, np.int64)))
        placed.extend(steps)
        at = end

    loose = steps_of.pop(-1, [])
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
    order = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in placed]) if placed else np.zeros(0, np.int64)
    return order, groups


def _cut(start: int, end: int, size: int) -> list[tuple[int, int]]:
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
    dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = False,
) -> LinearPlan:
    index = np.zeros((0, 2), np.int64) if pairs is None else pairs.host_index.numpy()
    return make_plan(
        layout.host_step_offsets.numpy(), index, vocab=vocab, hidden=hidden, dtype=dtype,
        chunk_rows=rows_per_chunk(vocab, dtype, chunk_bytes, layout.device.type),
        hidden_gradient=hidden_gradient, weight_gradient=weight_gradient, bias_gradient=bias_gradient,
    )  # fmt: skip
