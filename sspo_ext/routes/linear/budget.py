# SPDX-License-Identifier: Apache-2.0
"""How many rows of logits a chunk may have."""

from __future__ import annotations

from typing import NamedTuple

import torch

# At a vocabulary of 150k this is enough rows for a fast GEMM, and small beside any model with such a head.
DEFAULT_CHUNK_BYTES = {"cpu": 128 << 20}

_OTHER_DEVICES = 512 << 20

# The share of a GPU's memory that the logits of one unit may take: 5 GB of 80.
_OF_MEMORY = 16


# With batch_invariant every product of logits has so many rows. More cost small batches more, and fewer all others: a
# GPU reads the whole head for each tile.
_TILE_ROWS = {"cpu": 128}

_TILE_ROWS_ELSEWHERE = 256


class Budget(NamedTuple):
    """Rows of logits; at least one each."""

    rows: int  # of a chunk
    rows_at_once: int  # a batch with no more is one chunk
    rows_of_a_unit: int  # to which a chunk may grow for a unit that would otherwise be computed twice
    tile: int  # rows of every product of logits, so that no row's bits depend on the others; 1: products have any size


def tile_rows(batch_invariant: bool, device: torch.device) -> int:
    """The rows of a product of logits, or 1 where products may have any size."""
    return _TILE_ROWS.get(device.type, _TILE_ROWS_ELSEWHERE) if batch_invariant else 1


def whole_tiles(rows: int, tile: int) -> int:
    """The rows with those that fill the last tile."""
    return -(-rows // tile) * tile


def rows_per_chunk(vocab: int, dtype: torch.dtype, chunk_bytes: int | None, device_type: str) -> int:
    """Rows whose (rows, V) logits fit in the budget; at least one."""
    budget = DEFAULT_CHUNK_BYTES.get(device_type, _OTHER_DEVICES) if chunk_bytes is None else chunk_bytes
    return max(1, budget // (max(vocab, 1) * dtype.itemsize))


def budget_of(
    vocab: int,
    dtype: torch.dtype,
    chunk_bytes: int | None,
    device: torch.device,
    *,
    accumulator_columns: int = 0,
    sharded: bool = False,
    batch_invariant: bool = False,
) -> Budget:
    """The rows of a call's chunks.

    Args:
        vocab: V, times the logits buffers that share the budget.
        dtype: That of the logits.
        chunk_bytes: A budget that was asked for, which is kept; None: chunks may grow.
        device: Where the logits are.
        accumulator_columns: H, if the weight's gradient needs a (V, H) float32 sum as soon as there are two chunks.
            One chunk needs none, so a batch is one chunk while its logits are not larger than budget and sum together.
        sharded: Ranks cut the vocabulary. They must cut the same chunks, and their cards may differ.
        batch_invariant: Chunks are whole tiles, at least one even beyond a budget that was asked for.
    """
    tile = tile_rows(batch_invariant, device)
    rows = max(tile, rows_per_chunk(vocab, dtype, chunk_bytes, device.type) // tile * tile)
    if chunk_bytes is not None:
        return Budget(rows, rows, rows, tile)
    at_once, of_a_unit = rows + accumulator_columns * 4 // dtype.itemsize, rows
    if device.type == "cuda" and not sharded:
        # the card's whole memory, not what is free: a run gives the same bits whatever else is on the card
        memory = torch.cuda.get_device_properties(device).total_memory
        of_a_unit = max(rows, rows_per_chunk(vocab, dtype, memory // _OF_MEMORY, device.type))
    return Budget(rows, at_once, of_a_unit, tile)
