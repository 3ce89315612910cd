# SPDX-License-Identifier: Apache-2.0
"""The rows of steps on the host: one for each of their tokens, or fewer where steps of a tree share rows."""

from __future__ import annotations

import numpy as np

from ...layout.pairs import connected_steps


class StepRows:
    """Tokens [offsets[s], offsets[s + 1]) are step s's; token n has row `row[n]`, or row n without a table."""

    def __init__(self, offsets: np.ndarray, row: np.ndarray | None):
        self.offsets, self.row, self.counts = offsets, row, np.diff(offsets)
        self.num_rows = int(offsets[-1]) if row is None else int(row.max(initial=-1)) + 1

    def tokens(self, steps: list[int] | np.ndarray) -> np.ndarray:
        """The tokens of these steps, step by step."""
        return _ranges(self.offsets[steps], self.counts[steps])

    def rows(self, steps: list[int] | np.ndarray) -> np.ndarray:
        """The rows of these steps, each once, in the order in which tokens meet them."""
        tokens = self.tokens(steps)
        if self.row is None:
            return tokens
        rows, seen = np.unique(self.row[tokens], return_index=True)
        return rows[np.argsort(seen)]

    def size(self, steps: list[int]) -> int:
        """How many rows these steps have."""
        return int(self.counts[steps].sum()) if self.row is None else len(self.rows(steps))

    def links(self, live: np.ndarray) -> np.ndarray:
        """(K, 2): pairs of those steps in `live` that share a row, enough to connect all of them."""
        if self.row is None:
            return np.zeros((0, 2), np.int64)
        tokens = self.tokens(live)
        order = np.argsort(self.row[tokens], kind="stable")
        row, step = self.row[tokens][order], np.repeat(live, self.counts[live])[order]
        same = (row[1:] == row[:-1]) & (step[1:] != step[:-1])
        return np.unique(np.stack([step[:-1][same], step[1:][same]], axis=1), axis=0)


def units_that_share(units: StepRows) -> list[np.ndarray]:
    """The units with tokens, in sets that share no row with each other, in the order of their first units."""
    live = np.flatnonzero(units.counts)
    of = connected_steps(units.links(live), len(units.counts))
    of = np.where(of < 0, np.arange(len(of)), of)[live]
    order = np.argsort(of, kind="stable")
    starts = np.flatnonzero(np.diff(of[order], prepend=-1))
    return np.split(live[order], starts[1:]) if len(live) else []


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each length, one after the other."""
    lengths = np.asarray(lengths, np.int64)
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(np.asarray(starts, np.int64) - before, lengths)
