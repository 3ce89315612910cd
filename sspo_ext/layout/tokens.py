# SPDX-License-Identifier: Apache-2.0
"""The tokens of a batch while its layout is built, and the words of its errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where each token of a (B, T) batch stands."""

    step: np.ndarray  # (B, T): step in the batch's numbering, -1 for none
    sequence: np.ndarray  # (B, T)
    position: np.ndarray  # (B, T): position within the sequence

    def described(self, label: np.ndarray, index) -> tuple[int, int, int]:
        """(value, sequence, position) of a label, for an error message."""
        at = tuple(index)
        return int(label[at]), int(self.sequence[at]), int(self.position[at])


def refuse_ids(bad: np.ndarray, ids: np.ndarray, name: str, expected: str) -> None:
    """Raises for the first entry that is bad."""
    if bad.any():
        b, t = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}: expected {expected}, got {int(ids[b, t])} in sequence {b} at position {t}")


def label_message(where: tuple[int, int, int], vocab_size: int | None, ignore_index: int | None) -> str:
    """The error for a label that is no token; `where` is (value, sequence, position)."""
    value, sequence, position = where
    upper = "V" if vocab_size is None else str(vocab_size)
    other = "" if ignore_index is None else f" or {ignore_index} (ignore_index)"
    return f"labels: expected values in [0, {upper}){other}, got {value} in sequence {sequence} at position {position}"
