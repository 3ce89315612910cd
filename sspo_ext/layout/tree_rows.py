# SPDX-License-Identifier: Apache-2.0
"""The rows of a tree of sequences: which token each sequence reads where, and which tokens share a row.

A token's row is the position before it on its path, which need not be the column before it. A shared token that several
sequences score is one row, and a position where the tree branches is a row for each label that it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import check_float, check_integer, check_shape, describe
from .bundle import TensorBundle
from .tree import TokenTree


@dataclass(frozen=True, eq=False, repr=False)
class TreeRows(TensorBundle):
    """How the N scored tokens of a tree's sequences stand to the U rows of its layout, a (position, label) each.

    E rows, the extra ones, are further labels of a position that has a row already; G positions have such rows.
    """

    places: Tensor  # (N,) int64: where each scored token itself stands in the grid
    row: Tensor | None  # (N,) int64: its row; None: row n belongs to token n, and to no other
    first: Tensor | None  # (G,) int64: the first row of each position that has several; None, as below: none has
    extra: Tensor | None  # (E,) int64: their other rows
    group: Tensor | None  # (E,) int64: which of the G positions an extra row is of
    host_row: Tensor | None  # (N,) int64
    host_row_offsets: Tensor | None  # (2,) int64: [0, U], as if all rows were one step


def checked_sequences(name: str, values: Sequence, lengths: np.ndarray, *, floating: bool = False) -> list[Tensor]:
    """One 1-D tensor on the host for each sequence, as long as the sequence."""
    if isinstance(values, (Tensor, np.ndarray, str)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list of 1-D tensors, one for each sequence, got {describe(values)}")
    if len(values) != len(lengths):
        raise ValueError(f"{name}: expected {len(lengths)} tensors, one for each sequence, got {len(values)}")
    made = []
    for b, (value, length) in enumerate(zip(values, lengths.tolist(), strict=True)):
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if floating:
            check_float(f"{name}[{b}]", value)
        else:
            check_integer(f"{name}[{b}]", value)
        check_shape(f"{name}[{b}]", value, (length,))
        made.append(value.detach().cpu())
    return made


def padded(sequences: list[Tensor], fill: float) -> Tensor:
    """(B, T) from B sequences, T the longest of them."""
    if not sequences:
        return torch.zeros((0, 0), dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)


def rows_of_tree(tree: TokenTree, rows: np.ndarray, labels: np.ndarray, length: int) -> dict:
    """Those fields of a StepLayout that a tree changes.

    Args:
        tree: the tree of B sequences.
        rows: (N,) the scored tokens' rows b * length + t - 1 in a padded batch of the same sequences.
        labels: (N,) their labels.
        length: of a row of that batch.
    """
    shape = (tree.input_ids.shape[0], tree.input_ids.shape[1])
    at = tree.host_offsets.numpy()[rows // max(length, 1)] + rows % max(length, 1)
    place = tree.host_place.numpy()
    position, places = place[at], place[at + 1]

    known, label_number = np.unique(labels, return_inverse=True)
    key = position * max(len(known), 1) + label_number
    _, seen, inverse = np.unique(key, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(seen))
    kept = np.sort(seen)  # rows in the order in which tokens meet them
    row = rank[inverse]
    row_position = position[kept]

    positions, first, of_position, count = np.unique(
        row_position, return_index=True, return_inverse=True, return_counts=True
    )
    row_of = np.full(shape[0] * shape[1], -1, np.int64)
    row_of[positions] = first
    branching = np.flatnonzero(count > 1)
    extra = np.flatnonzero(first[of_position] != np.arange(len(kept)))
    group = np.searchsorted(branching, of_position[extra])

    shared, branches = len(kept) < len(row), len(extra) > 0

    def tensor(array: np.ndarray, given: bool = True) -> Tensor | None:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)) if given else None

    return {
        "rows": tensor(row_position),
        "labels": tensor(labels[kept]),
        "row_of": torch.from_numpy(row_of.astype(np.int32)),
        "shape": shape,
        "tree_rows": TreeRows(
            places=torch.from_numpy(np.ascontiguousarray(places)),
            row=tensor(row, shared),
            first=tensor(first[branching], branches),
            extra=tensor(extra, branches),
            group=tensor(group, branches),
            host_row=tensor(row, shared),
            host_row_offsets=tensor(np.array([0, len(kept)]), shared),
        ),
    }
