# SPDX-License-Identifier: Apache-2.0
"""A process's part of a layout, where each process has some positions of every row (context or sequence parallel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._checks import check_integer, check_kind
from .bundle import Built, TensorBundle
from .response import refuse_logits
from .steps import StepLayout


@dataclass(frozen=True, eq=False, repr=False)
class LayoutPart(Built, TensorBundle):
    """The scored rows of a layout at some of its positions. Build it with `from_positions`.

    A label belongs to the process that has the position before it, whichever has the token itself. So no label is lost
    where the rows are cut, as layouts made of pieces of labels would lose it.

    Examples:
        >>> positions = torch.arange(16).chunk(1)[0]  # those of process 0 of 1
        >>> part = LayoutPart.from_positions(layout, positions)
        >>> mine = step_logps(logits[:, positions], part.layout)
        >>> logps = gather_logps(mine, part)  # of the whole layout, on every process
        >>> out = pref_loss(logps, layout, pairs, reference_free=True)
    """

    whole: StepLayout
    layout: StepLayout  # (B, T') of these positions, with all S steps: those without tokens here are empty
    rows: Tensor  # (N',) int64: which of the N rows of the whole these are, ascending

    def __repr__(self) -> str:
        return f"LayoutPart({self.layout.num_rows} of {self.whole.num_rows} rows, shape={self.layout.shape})"

    @classmethod
    def from_positions(cls, layout: StepLayout, positions: Tensor | Sequence[int]) -> LayoutPart:
        """The part of a layout at the positions whose hidden states or logits this process has.

        Build it where the layout is on the host, as in a collator; on a device its rows are copied once (a sync).

        Args:
            layout: StepLayout of the whole rows, padded (B, T) or packed (1, total).
            positions: (T',) int, ascending: columns of the layout, the same for all its rows. Every scored position has
                to be on one process and no other, which `gather_logps` checks.

        Returns:
            A LayoutPart on the layout's device.

        Raises:
            TypeError: An argument is no StepLayout, or holds no integers.
            ValueError: Positions do not ascend or are outside the layout, or the layout is a tree's or has no labels.

        Examples:
            >>> layout = StepLayout.from_step_ids(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-1, 0, 0, 1]]))
            >>> LayoutPart.from_positions(layout, range(2))
            LayoutPart(2 of 3 rows, shape=(1, 2))
        """
        check_kind("layout", layout, StepLayout, "a StepLayout")
        if layout.tree_rows is not None:
            raise ValueError("layout: expected padded or packed rows, got a tree, whose rows cannot be cut")
        refuse_logits(layout.num_rows, layout.labels.shape[0])
        if not isinstance(positions, Tensor):
            positions = torch.tensor(list(positions) or np.zeros(0, np.int64))
        check_integer("positions", positions, ndim=1)
        columns, length = positions.cpu().numpy().astype(np.int64), layout.shape[1]
        if len(columns) and ((np.diff(columns) <= 0).any() or columns[0] < 0 or columns[-1] >= length):
            raise ValueError(
                f"positions: expected ascending columns in [0, {length}), got {columns[:8].tolist()}"
                f"{'...' if len(columns) > 8 else ''}"
            )
        column_here = np.full(length, -1, np.int64)
        column_here[columns] = np.arange(len(columns))
        sequence, column = np.divmod(layout.rows.cpu().numpy(), max(length, 1))
        kept = np.flatnonzero(column_here[column] >= 0)
        rows = sequence[kept] * len(columns) + column_here[column[kept]]
        return cls(whole=layout, layout=_rows_of(layout, kept, rows, len(columns)), rows=_tensor(kept, layout))


def _tensor(values: np.ndarray, layout: StepLayout, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.from_numpy(values).to(dtype=dtype).to(layout.device, non_blocking=True)


def _rows_of(layout: StepLayout, kept: np.ndarray, rows: np.ndarray, length: int) -> StepLayout:
    """The layout of the rows `kept` (N',), which are at positions `rows` (N',) of a batch of that length."""
    steps = layout.num_steps
    of_row = np.repeat(np.arange(steps), np.diff(layout.host_step_offsets.numpy()))[kept]
    offsets = np.zeros(steps + 1, np.int64)
    np.cumsum(np.bincount(of_row, minlength=steps), out=offsets[1:])
    first_steps = np.searchsorted(layout.host_step_sequence.numpy(), np.arange(layout.num_sequences + 1))
    row_of = np.full(layout.shape[0] * length, -1, np.int32)
    row_of[rows] = np.arange(len(rows))
    index = _tensor(kept, layout)
    return replace(
        layout,
        rows=_tensor(rows, layout),
        labels=layout.labels[index],
        weights=None if layout.weights is None else layout.weights[index],
        step_offsets=_tensor(offsets, layout, torch.int32),
        step_of_row=_tensor(of_row, layout),
        sequence_offsets=_tensor(offsets[first_steps], layout, torch.int32),
        row_of=_tensor(row_of, layout, torch.int32),
        kept=None if layout.kept is None else layout.kept.of_rows(kept),
        shape=(layout.shape[0], length),
        host_step_offsets=torch.from_numpy(offsets),
        host_sequence_offsets=torch.from_numpy(offsets[first_steps]),
        one_row_per_step=bool((np.diff(offsets) == 1).all()),
    )
