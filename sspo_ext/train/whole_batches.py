# SPDX-License-Identifier: Apache-2.0
"""Fills the last batches of several processes with empty rows, where accelerate would repeat real ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, Dataset, IterableDataset

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


def fill_last_batches(dataloader: Any) -> None:
    """Makes a prepared dataloader end with row number len(dataset), as often as its processes need to be even.

    It changes neither the order of the rows nor the size of the dataset, on which that order depends.

    Args:
        dataloader: Of accelerate, for several processes, over `whole_batches(rows, 1)`.
    """
    shard = dataloader.batch_sampler
    if isinstance(shard, BatchSamplerShard):
        together = 1 if shard.split_batches else shard.num_processes
        shard.batch_sampler = _Filled(shard.batch_sampler, together, len(dataloader.dataset))


class _Filled(BatchSampler):
    """Batches of full size, a multiple of `together` of them."""

    def __init__(self, batches: Any, together: int, empty: int):
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self.batches, self.together, self.empty = batches, together, empty

    def __len__(self) -> int:
        return -(-len(self.batches) // self.together) * self.together

    def __iter__(self) -> Iterator[list[int]]:
        count = 0
        for count, batch in enumerate(self.batches, 1):  # noqa: B007
            yield batch + [self.empty] * (self.batch_size - len(batch))
        yield from repeat([self.empty] * self.batch_size, -count % self.together)


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

    def set_epoch(self, epoch: int) -> None:
        """Tells the dataset, if it wants to know."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

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
