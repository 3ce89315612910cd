# SPDX-License-Identifier: Apache-2.0
"""Pads evaluation with empty rows so that accelerate repeats no real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch.utils.data import Dataset, IterableDataset

from ..data.collator import SIDES


def whole_batches(dataset, size: int) -> Dataset:
    """Returns the dataset with empty rows at its end, so that its length is a multiple of `size`.

    Args:
        dataset: Features of preference rows, with or without a length.
        size: The number of rows in the batches of all processes together.

    Returns:
        A dataset. Its empty rows have one token, no step and no pair, and count in no metric.
    """
    return _Rows(dataset, size) if hasattr(dataset, "__len__") else _Stream(dataset, size)


class _Rows(Dataset):
    def __init__(self, dataset: Sequence[dict], size: int):
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.size) * self.size

    def __getitem__(self, i: int) -> dict:
        return self.dataset[i] if i < len(self.dataset) else _without_pairs(self.dataset[0])


class _Stream(IterableDataset):
    def __init__(self, dataset, size: int):
        self.dataset, self.size = dataset, size

    def __iter__(self) -> Iterator[dict]:
        count, row = 0, {}
        for row in self.dataset:
            count += 1
            yield row
        yield from repeat(_without_pairs(row) if row else row, -count % self.size)


def _without_pairs(row: dict) -> dict:
    """An empty row with the columns of `row`."""
    empty = {**row, "pairs": []}
    for side in SIDES:
        parts = {"input_ids": row[f"{side}_input_ids"][:1], "labels": [-100], "step_ids": [-1]}
        empty |= {f"{side}_{name}": value for name, value in parts.items()}
        if f"ref_{side}" in row:
            empty[f"ref_{side}"] = []
    return empty
