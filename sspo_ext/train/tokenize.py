"""From a preference row to token ids, labels, step ids and the pairs of steps to compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..signals.split import SplitBy


class UnusableRow(ValueError):
    """A row that is well formed but leaves nothing to compare; the message says why."""


def tokenize_row(
    row: Mapping,
    tokenizer,
    *,
    split_by: SplitBy = "newline",
    pair_by: str = "index",
    max_length: int | None = None,
    overflow: str = "drop",
    add_eos: bool = True,
    skip_shared: bool = True,
) -> dict:
    """{"chosen_input_ids", "chosen_labels", "chosen_step_ids", the same for "rejected_...", "pairs", "weight", "margin", "source"}."""
    raise NotImplementedError


def tokenize_rows(rows: Iterable[Mapping], tokenizer, **options) -> list[dict]:
    """`tokenize_row` over all rows; unusable ones are counted and reported in one warning."""
    raise NotImplementedError
