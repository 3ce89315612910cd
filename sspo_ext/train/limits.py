# SPDX-License-Identifier: Apache-2.0
"""What a model can read, and whether the rows of a trainer fit it: found before training, where a row has a name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from .._checks import describe
from ..data.collator import SIDES
from ..data.reading import name_some, raise_bad_rows
from .model_call import hf_model
from .reference_cache import TOKEN_COLUMNS

logger = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What a model can read.

    Attributes:
        vocab: The number of its embeddings.
        positions: The most tokens that it was made for; None means that it does not say.
        fixed: Whether it can read no more than `positions`. Rotary positions go on, in the quality that they have.
    """

    vocab: int
    positions: int | None = None
    fixed: bool = False


def model_limits(model: nn.Module) -> Limits:
    """The limits that a model's embeddings and its config say."""
    embeddings: Any = hf_model(model).get_input_embeddings()
    # the weight of a sharded model may be empty here
    vocab = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
    config = hf_model(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    return Limits(vocab, positions if isinstance(positions, int) and positions > 0 else None, not rotary)


def check_fits(
    name: str, rows: Iterable[tuple[str, Sequence[Sequence[int]]]], limits: Limits, *, more: int = 0
) -> None:
    """Checks that a model can read the texts of rows.

    Args:
        name: What errors call the rows.
        rows: The name of each row, and the token ids of its texts.
        limits: The model's.
        more: How many tokens may follow a text.

    Raises:
        ValueError: For a token without an embedding, or a text longer than a table of positions. The message names the
            rows. Other models that were made for shorter texts give one warning.
    """
    bad: list[tuple[str, str]] = []
    long: list[str] = []
    total = 0
    for total, (where, texts) in enumerate(rows, 1):  # noqa: B007
        highest, length = max(max(ids, default=0) for ids in texts), max(map(len, texts))
        if highest >= limits.vocab:
            reason = f"token {highest} has no embedding, since the model has {limits.vocab}; is it this tokenizer's?"
            bad.append((where, reason))
        elif limits.positions is not None and length + more > limits.positions:
            if limits.fixed:
                tokens = f"{length} tokens" + (f", and {more} that may follow," if more else "")
                bad.append((where, f"{tokens} do not fit the model's {limits.positions} positions"))
            else:
                long.append(where)
    try:
        raise_bad_rows(bad, total)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if long:
        logger.warning(
            "%s: %d of %d rows %s more tokens than the %d positions that the model was made for (%s)",
            name, len(long), total, "may reach" if more else "have", limits.positions, name_some(long),
        )  # fmt: skip


def check_features(name: str, dataset: Any, limits: Limits | None) -> None:
    """Checks a dataset of preference features.

    Args:
        name: What errors call it.
        dataset: Features of `tokenize_rows`, with a length or without. Of a dataset without one only the first row is
            looked at.
        limits: What the model can read.

    Raises:
        TypeError: For a dataset that is no collection of rows.
        ValueError: For a dataset without rows, rows that are not tokenized, and rows that do not fit the limits.
    """
    if isinstance(dataset, str | Mapping) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise TypeError(f"{name}: expected the features of tokenize_rows, got {describe(dataset)}")
    sized = hasattr(dataset, "__len__")
    if sized and not len(dataset):
        raise ValueError(f"{name}: expected at least one row, got none")
    first = dataset[0] if sized else next(iter(dataset), None)
    if first is None:
        return
    missing = [] if isinstance(first, Mapping) else TOKEN_COLUMNS
    missing = missing or [column for column in TOKEN_COLUMNS if column not in first]
    if missing:
        # tokenize_rows decides how a response is split and what is compared, which nobody should find out afterwards
        raise ValueError(
            f"{name}: expected the features of tokenize_rows, got a row without {missing[0]!r}: {describe(first)}; "
            "call tokenize_rows(load_preference_rows(rows), tokenizer) first"
        )
    if sized and limits is not None:
        rows = (
            (feature.get("source") or f"row {i}", [feature[f"{side}_input_ids"] for side in SIDES])
            for i, feature in enumerate(dataset[i] for i in range(len(dataset)))
        )
        check_fits(name, rows, limits)
