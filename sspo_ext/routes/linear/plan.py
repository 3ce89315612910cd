# SPDX-License-Identifier: Apache-2.0
"""The schedule of the linear route: which rows share a chunk, and how many GEMMs each costs. Made on the host.

A GEMM is N x H x V. What a row costs:

* One GEMM, its logits, without gradients, and for a step in no pair.
* Two with a frozen head: d loss/d hidden is a scalar times a direction, which is known at once.
* Three with a trained head, if the row's unit fits in a chunk: the head's derivative is then known while the chunk's
  logits are still there. A unit is a connected set of pairs, or the step or sequence that shares a ratio.
* Four for a unit larger than a chunk, which is computed twice.
* With entropy, sum_p2 or kl beside the log-probs, gradients are known only in backward: three with a frozen head, four
  with a trained one. The reference's logits for kl are a GEMM of their own (N x H of the reference x V) in each
  direction.
* Four with a trained head in float16, whose gradients wait for the caller's loss scale and are made in backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...layout.packing import packed
from ...layout.pairs import StepPairs, connected_steps
from ...layout.steps import StepLayout
from ...layout.tree_rows import first_met
from ...objective.idle import idle_rows, offsets_among, units_on_host
from ..tree_rows import host_row
from .budget import budget_of, whole_tiles
from .step_rows import StepRows, units_that_share


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are worked on together: the losses of their steps depend on no step outside the group.

    kind: "logps" (logits only), "frozen" (logits and direction), "complete" (one chunk, in which the head's derivative
    is known), "recompute" (all log-probs first, then the chunks again), "later" (gradients known only in backward).
    """

    kind: str
    start: int  # its rows are [start, end) of the plan's row order
    end: int
    chunks: list[tuple[int, int]]  # of rows, in the plan's order
    steps: np.ndarray = field(repr=False)  # the layout's steps (a policy loss's units), in the order of their rows
    pairs: np.ndarray = field(repr=False)  # indices of pairs


@dataclass(frozen=True, eq=False)
class Products:
    """The sizes of a call's GEMMs, and the gradients that are wanted."""

    chunk_rows: int
    rows_at_once: int  # a batch with no more rows is one chunk
    rows_of_a_unit: int  # to which a chunk may grow for a unit that would otherwise be computed twice
    tile: int  # rows of every product of logits; 1: they have any size
    vocab: int
    hidden: int
    dtype: torch.dtype
    hidden_gradient: bool
    weight_gradient: bool
    bias_gradient: bool

    @property
    def trained(self) -> bool:
        """Whether the head itself gets a gradient."""
        return self.weight_gradient or self.bias_gradient

    def cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """[start, end) in the fewest chunks, as even as they can be; all but the last are whole tiles."""
        count = -(-(end - start) // self.chunk_rows)
        edges = np.linspace(start, end, count + 1).round().astype(int).tolist() if count else [start]
        edges = [min(start + whole_tiles(edge - start, self.tile), end) for edge in edges]
        return list(zip(edges[:-1], edges[1:], strict=True))


@dataclass(frozen=True, eq=False)
class LinearPlan(Products):
    """What a call of the linear route is about to do. `print(plan)` shows it.

    Examples:
        >>> from sspo_ext.losses import pref_plan
        >>> plan = pref_plan(layout, pairs, vocab=32_000, hidden=2048)
        >>> text, flops = str(plan), plan.flops
    """

    num_rows: int
    order: np.ndarray | None = field(repr=False)  # (N,) the layout's row at each place; None when they keep their order
    groups: list[Group] = field(repr=False)
    on_device: dict = field(default_factory=dict, repr=False)  # tables made from the groups, by name, device and stream

    @property
    def gemm_rows(self) -> int:
        """Sum over rows of the GEMMs that each enters, rows that fill a tile included."""
        total, gradients = 0, self.weight_gradient + self.hidden_gradient
        for group in self.groups:
            sizes = [end - start for start, end in group.chunks]
            computed = [whole_tiles(size, self.tile) for size in sizes]
            total += sum(sizes) * {"logps": 0, "frozen": 1}.get(group.kind, gradients)
            total += sum(computed) * (2 if group.kind in ("recompute", "later") else 1)
            if group.kind == "recompute":
                # the last chunk's logits are still in the buffer when the backward sweep starts with it
                total -= computed[-1]
        return total

    @property
    def flops(self) -> int:
        """Floating-point operations of all GEMMs."""
        return 2 * self.hidden * self.vocab * self.gemm_rows

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the reused logits buffer."""
        rows = whole_tiles(min(self.chunk_rows, max(self.num_rows, 1)), self.tile)
        return rows * self.vocab * self.dtype.itemsize

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of the float32 sum that a 16-bit weight's gradient needs over several chunks."""
        needed = self.weight_gradient and self.dtype.itemsize == 2 and self.weight_chunks > 1
        return 4 * self.vocab * self.hidden * needed

    @property
    def weight_chunks(self) -> int:
        """How many products add up to the weight's gradient."""
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
            + (
                f", sum of the weight's gradient {self.accumulator_bytes / 2**20:.1f} MiB"
                * bool(self.accumulator_bytes)
            )
        )


def make_plan(
    host_step_offsets: np.ndarray,  # (S + 1,)
    host_pair_index: np.ndarray | None,  # (P, 2); None: gradients of single steps, known only in backward
    products: Products,
    *,
    reductions: bool = False,
    host_row: np.ndarray | None = None,  # (N,) the row of each token, where steps share rows
) -> LinearPlan:
    """The plan of a pair loss, or of log-probs alone."""
    step_rows = StepRows(host_step_offsets, host_row)
    num_rows, num_steps = step_rows.num_rows, len(host_step_offsets) - 1
    trained, hidden_gradient = products.trained, products.hidden_gradient
    order = None
    if host_pair_index is None or not (hidden_gradient or trained):
        later = trained or (reductions and hidden_gradient)
        kind = "later" if later else "frozen" if hidden_gradient else "logps"
        pairs = np.arange(0 if host_pair_index is None else len(host_pair_index))
        groups = [Group(kind, 0, num_rows, products.cut(0, num_rows), np.arange(num_steps), pairs)]
    else:
        order, groups, products = _groups_by_unit(step_rows, host_pair_index, products)
    return LinearPlan(**vars(products), num_rows=num_rows, order=order, groups=groups)


def _groups_by_unit(
    step_rows: StepRows, index: np.ndarray, products: Products
) -> tuple[np.ndarray, list[Group], Products]:
    """(row order, groups, products): rows are ordered by unit, and whole units fill chunks.

    Chunks grow to the largest unit, where they may. A unit larger than a chunk is a group of its own. With a frozen
    head all units are one group, since its chunks may be cut anywhere. Steps in no pair come last. Steps that share a
    row are of one unit, because the row's coefficient is a sum over them.
    """
    counts = step_rows.counts
    # a pair with an empty step is not in the loss, so it connects no steps
    live_pairs = np.flatnonzero((counts[index] > 0).all(axis=1)) if len(index) else np.zeros(0, np.int64)
    edges = index[live_pairs]
    if step_rows.row is not None:
        edges = np.concatenate([edges, step_rows.links(np.unique(edges))])
    unit = connected_steps(edges, len(counts))
    steps_of: dict[int, list[int]] = {}
    for step, u in enumerate(unit.tolist()):
        steps_of.setdefault(u, []).append(step)
    pairs_of: dict[int, list[int]] = {}
    for pair in live_pairs.tolist():
        pairs_of.setdefault(int(unit[index[pair, 0]]), []).append(pair)
    loose = steps_of.pop(-1, [])
    sizes = {u: step_rows.size(members) for u, members in steps_of.items()}
    if products.trained:
        products = _grown(products, list(sizes.values()))

    groups: list[Group] = []
    placed: list[np.ndarray] = []  # rows in order
    done = np.zeros(step_rows.num_rows, bool)
    at = 0

    def add(kind: str, units: list[int], steps: list[int] | None = None) -> None:
        nonlocal at
        steps = [s for u in units for s in steps_of[u]] if steps is None else steps
        rows = step_rows.rows(steps)
        rows = rows[~done[rows]]  # steps in no pair may share rows with others
        done[rows] = True
        end = at + len(rows)
        if counts[steps].any():
            cut = products.cut(at, end)
            pairs = [p for u in units for p in pairs_of[u]]
            groups.append(Group(kind, at, end, cut, np.array(steps), np.array(pairs, np.int64)))
        placed.append(rows)
        at = end

    if not products.trained:
        add("frozen", list(steps_of))
    else:
        large = [u for u, size in sizes.items() if size > products.chunk_rows]
        small = [u for u in sizes if sizes[u] <= products.chunk_rows]
        for places in packed([sizes[u] for u in small], products.chunk_rows):
            add("complete", [small[place] for place in places])
        for u in large:
            add("recompute", [u])
    add("logps", [], loose)
    return np.concatenate(placed), groups, products


def _grown(products: Products, sizes: list[int]) -> Products:
    """With chunks that hold all units, or the largest that may be held."""
    rows = [products.chunk_rows, *(size for size in sizes if size <= products.rows_of_a_unit)]
    if sum(sizes) <= products.rows_at_once:
        rows.append(sum(sizes))
    return replace(products, chunk_rows=max(rows))


def make_policy_plan(
    host_unit_offsets: np.ndarray | None,  # (U + 1,) rows of the units, one after the other; None: each row is one
    num_rows: int,
    products: Products,
    host_row: np.ndarray | None = None,  # (N,) the row of each token, where units share rows
) -> LinearPlan:
    """The plan of a policy loss: groups of whole units that fit in a chunk, in the layout's order.

    A larger unit is a group of its own and is computed twice. Units that share a row count as one.
    """
    sets, order = None, None
    if host_row is not None and host_unit_offsets is not None:
        units = StepRows(host_unit_offsets, host_row)
        sets = units_that_share(units)
        rows = [units.rows(members) for members in sets]
        order = np.concatenate([np.zeros(0, np.int64), *rows])
        host_unit_offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    nothing = np.zeros(0, np.int64)
    if products.trained:
        products = _grown(
            products, [1] * num_rows if host_unit_offsets is None else np.diff(host_unit_offsets).tolist()
        )
    chunk_rows = products.chunk_rows

    def group(kind: str, start: int, end: int) -> Group:
        members = nothing
        if sets is not None and host_unit_offsets is not None:
            first, last = np.searchsorted(host_unit_offsets, [start, end])
            members = np.concatenate([nothing, *sets[first:last]])
        return Group(kind, start, end, products.cut(start, end), members, nothing)

    if not (products.hidden_gradient or products.trained):
        groups = [group("logps", 0, num_rows)]
    elif host_unit_offsets is None:
        groups = [group("complete", start, end) for start, end in products.cut(0, num_rows)]
    else:
        groups, start = [], 0
        ends = host_unit_offsets[1:].tolist()
        for end, after in zip(ends, [*ends, None][1:], strict=True):
            # close the group if it is already too large, or if the next unit would make it so
            if end > start and (after is None or after - start > chunk_rows):
                groups.append(group("complete" if end - start <= chunk_rows else "recompute", start, end))
                start = end
    return LinearPlan(**vars(products), num_rows=num_rows, order=order, groups=groups)


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
    batch_invariant: bool = False,
    logps_only: bool = False,
    reductions: bool = False,
) -> LinearPlan:
    """What `linear_step_pref_loss` will do with this batch: rows, chunks, GEMMs, FLOPs, bytes. Print it.

    Args:
        layout: the batch's StepLayout.
        pairs: its StepPairs; default: pair by index.
        vocab: V, rows of the head's weight.
        hidden: H, columns of the head's weight.
        dtype: the dtype of the GEMMs.
        chunk_bytes: budget of the logits buffer, in bytes; default: that of `linear_step_pref_loss`.
        hidden_gradient: whether the hidden states need a gradient.
        weight_gradient: whether the head's weight needs a gradient.
        bias_gradient: whether the head's bias needs a gradient.
        batch_invariant: that of the call.
        logps_only: plan `linear_step_logps` instead.
        reductions: plan `linear_step_logps` with entropy, sum_p2 or kl (for kl without the reference's own products).

    Returns:
        LinearPlan.

    Examples:
        >>> plan = pref_plan(layout, pairs, vocab=32_000, hidden=2048, dtype=torch.bfloat16)
        >>> text = str(plan)
    """
    columns = hidden if weight_gradient and dtype.itemsize == 2 else 0
    budget = budget_of(
        vocab, dtype, chunk_bytes, layout.device, accumulator_columns=columns, batch_invariant=batch_invariant
    )
    products = Products(*budget, vocab, hidden, dtype, hidden_gradient, weight_gradient, bias_gradient)
    index = None
    if not (logps_only or reductions):
        index = (layout.pair_by_index() if pairs is None else pairs).host_index.numpy()
    return _waiting_plan(layout.host_step_offsets.numpy(), index, products, reductions, _host_row(layout))


def policy_plan(
    layout: StepLayout,
    *,
    importance_sampling_level: str = "token",
    advantages: torch.Tensor | None = None,
    skip_zero_advantages: bool = False,
    vocab: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    bias_gradient: bool = False,
    batch_invariant: bool = False,
) -> LinearPlan:
    """What `linear_step_policy_loss` will do with a trained head: rows, chunks, GEMMs, FLOPs, bytes. Print it.

    Args:
        layout: the batch's StepLayout.
        importance_sampling_level: that of the loss: 'token', 'step' or 'sequence'.
        advantages: those of a loss without KL and entropy, on the host: idle rows cost one GEMM.
        skip_zero_advantages: that of the loss: they cost none.
        vocab: V, rows of the head's weight.
        hidden: H, columns of the head's weight.
        dtype: the dtype of the GEMMs.
        chunk_bytes: budget of the logits buffer, in bytes; default: that of `linear_step_pref_loss`.
        hidden_gradient: whether the hidden states need a gradient.
        weight_gradient: whether the head's weight needs a gradient.
        bias_gradient: whether the head's bias needs a gradient.
        batch_invariant: that of the call.

    Returns:
        LinearPlan.

    Examples:
        >>> plan = policy_plan(layout, importance_sampling_level="sequence", vocab=32_000, hidden=2048)
        >>> text = str(plan)
    """
    columns = hidden if weight_gradient and dtype.itemsize == 2 else 0
    budget = budget_of(
        vocab, dtype, chunk_bytes, layout.device, accumulator_columns=columns, batch_invariant=batch_invariant
    )
    products = Products(*budget, vocab, hidden, dtype, hidden_gradient, weight_gradient, bias_gradient)
    offsets, steps, rows = units_on_host(layout, importance_sampling_level), layout.host_step_offsets.numpy(), 0
    idle = None if advantages is None else idle_rows(advantages, layout, offsets)
    num_rows, row = layout.rows.shape[0], _host_row(layout)
    if idle is not None:
        busy = np.flatnonzero(~idle)
        steps = offsets_among(steps, busy)
        offsets = None if offsets is None else offsets_among(offsets, busy)
        row = None if row is None else first_met(row[busy])[1]
        num_busy = len(busy) if row is None else int(row.max(initial=-1)) + 1
        num_rows, rows = num_busy, 0 if skip_zero_advantages else num_rows - num_busy
    if dtype == torch.float16:
        plan = _waiting_plan(steps, None, products, False, row)
    else:
        plan = make_policy_plan(offsets, num_rows, products, row)
    if not rows:
        return plan
    nothing, start, end = np.zeros(0, np.int64), plan.num_rows, plan.num_rows + rows
    idle_group = Group("logps", start, end, products.cut(start, end), nothing, nothing)
    return replace(plan, num_rows=end, groups=[*plan.groups, idle_group])


def _waiting_plan(
    offsets: np.ndarray, index: np.ndarray | None, products: Products, reductions: bool, row: np.ndarray | None
) -> LinearPlan:
    """The plan of a call whose gradients wait for backward where they must, as in float16 with a trained head."""
    if products.dtype == torch.float16 and products.trained:
        index = None
    return make_plan(offsets, index, products, reductions=reductions, host_row=row)


def _host_row(layout: StepLayout) -> np.ndarray | None:
    row = host_row(layout)
    return None if row is None else row.numpy()
