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

from .._checks import check_float, check_integer, check_kind, check_shape, describe
from .bundle import TensorBundle
from .tree import TokenTree


@dataclass(frozen=True, eq=False, repr=False)
class SharedRows(TensorBundle):
    """Which of the U rows each of the N scored tokens has, where some tokens share one."""

    row: Tensor  # (N,) int64
    host_row: Tensor  # (N,) int64
    host_offsets: Tensor  # (2,) int64: [0, U], as if all rows were one step


@dataclass(frozen=True, eq=False, repr=False)
class Branches(TensorBundle):
    """The G positions that predict several labels: they have a first row each, and E rows more in all."""

    first: Tensor  # (G,) int64: the first row of each position
    extra: Tensor  # (E,) int64: the other rows, ascending
    position: Tensor  # (E,) int64: which of the G positions an extra row is at


@dataclass(frozen=True, eq=False, repr=False)
class TreeRows(TensorBundle):
    """How the N scored tokens of a tree's sequences stand to the U rows of its layout, a (position, label) each."""

    places: Tensor  # (N,) int64: where each scored token itself stands in the grid
    shared: SharedRows | None  # None: row n is token n's alone
    branches: Branches | None  # None: no position has two rows
    host_rows: Tensor  # (U,) int64: the position of each row


def sequence_lengths(tree: TokenTree) -> np.ndarray:
    """(B,): how many tokens each sequence has; TypeError for what is no tree."""
    check_kind("tree", tree, TokenTree, "a TokenTree")
    return np.diff(tree.host_offsets.numpy())


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
    kept, row = first_met(position * max(len(known), 1) + label_number)
    row_of = np.full(shape[0] * shape[1], -1, np.int32)
    positions, first = np.unique(position[kept], return_index=True)
    row_of[positions] = first
    return {
        "rows": _tensor(position[kept]),
        "labels": _tensor(labels[kept]),
        "row_of": torch.from_numpy(row_of),
        "shape": shape,
        "tree_rows": _tree_rows(_tensor(places), row, position[kept]),
    }


def rows_among(tree: TreeRows, kept: np.ndarray) -> tuple[np.ndarray, TreeRows]:
    """The rows that some tokens have, and the table of these tokens and rows alone.

    Args:
        tree: the table of N tokens.
        kept: (n,) the tokens, ascending.
    """
    if tree.shared is None:
        used, row = kept, np.arange(len(kept))
    else:
        of_token = tree.shared.host_row.numpy()[kept]
        met, row = first_met(of_token)
        used = of_token[met]
    index = torch.from_numpy(kept).to(tree.places.device, non_blocking=True)
    return used, _tree_rows(tree.places[index], row, tree.host_rows.numpy()[used])


def first_met(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct value is first (U,), ascending, and which of them each value is (N,)."""
    _, seen, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.sort(seen), np.argsort(np.argsort(seen))[inverse]


def _tree_rows(places: Tensor, row: np.ndarray, position: np.ndarray) -> TreeRows:
    """The tables of N tokens and U rows, from the tokens' rows (N,) and the rows' positions (U,)."""
    size, shared, branches = len(position), None, None
    if size < len(row):
        shared = SharedRows(_tensor(row), _tensor(row), _tensor(np.array([0, size])))
    _, first, group, count = np.unique(position, return_index=True, return_inverse=True, return_counts=True)
    extra = np.flatnonzero(first[group] != np.arange(size))
    if len(extra):
        branching = np.flatnonzero(count > 1)
        at = np.searchsorted(branching, group[extra])
        branches = Branches(_tensor(first[branching]), _tensor(extra), _tensor(at))
    return TreeRows(places, shared, branches, _tensor(position))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64))
