# SPDX-License-Identifier: Apache-2.0
"""A rollout engine of our own: a loop over the key-value cache that drops rows as they end."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..hf.cache import cache_input, why_no_cache
from ..hf.wrappers import base_model, takes
from .batch_engine import BatchEngine, device_of, left_padded
from .drawing import Chooser
from .packed_weights import packed_weights
from .roomy_cache import RoomyCache
from .sampling import Completions, Sampling

logger = logging.getLogger(__name__)


class Forgets(ValueError):
    """A model that does not keep its context in the DynamicCache that it is given."""


class CompactEngine(BatchEngine):
    """A loop over the key-value cache. A prompt is read once for all of its rows, and rows that have ended are dropped.

    The cache is a `RoomyCache`: a token is written into it in place. On CPUs the weights are packed meanwhile.
    A model whose cache cannot be used goes to the engine `otherwise`, or is refused where that is None.
    """

    def __init__(self, pad_token_id: int, rows_at_once: int | None = None, otherwise: BatchEngine | None = None):
        super().__init__(pad_token_id, rows_at_once)
        self.otherwise = otherwise

    def complete(self, model, prompts, sampling: Sampling, seeds) -> list[list[int]] | Completions:
        """See `RolloutEngine.complete`."""
        try:
            _check(model, why_no_cache(model))
            with packed_weights(model, max(min(self.rows_at_once or len(prompts), len(prompts)), 1)):
                return super().complete(model, prompts, sampling, seeds)
        except Forgets as error:
            if self.otherwise is None:
                raise
            logger.info("completions by 'generate': %s", error)
            return self.otherwise.complete(model, prompts, sampling, seeds)

    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> Completions:
        device, longest = device_of(model), sampling.max_completion_length
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        inputs = left_padded(list(number), self.pad_token_id, device)
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        width = ids.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), longest)], 1)
        positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
        ends = torch.tensor(sampling.eos_token_ids, device=device)
        chooser, cache = Chooser(sampling, seeds, device), RoomyCache()
        kept = cache_input(model, cache)
        # the rows of the batch that stand in the cache's rows; before the first token these are prompts
        rows = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        tokens = torch.full((len(rows), longest), self.pad_token_id, device=device)
        lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
        for t in range(longest):
            where = {"position_ids": positions, "logits_to_keep": 1}
            where = {name: value for name, value in where.items() if takes(model, name)}
            out = model(input_ids=ids, attention_mask=mask[:, : width + t], use_cache=True, **where, **kept)
            logits = out.logits[:, -1]
            if t == 0:
                held = cache.get_seq_length()
                _check(model, None if held == width else f"it kept {held} of {width} tokens there")
                if len(number) < len(rows):
                    cache.batch_select_indices(rows)
                logits, mask, positions = logits[rows], mask[rows], positions[rows]
                rows = torch.arange(len(rows), device=device)
            drawn = chooser(logits, rows, t)
            tokens[rows, t] = drawn
            lengths[rows] = t + 1
            going = ~torch.isin(drawn, ends)
            if not going.all():
                places = closed_up(going)
                if not len(places):
                    break
                cache.batch_select_indices(places)
                rows, drawn, mask, positions = rows[places], drawn[places], mask[places], positions[places]
            ids, positions = drawn[:, None], positions[:, -1:] + 1
        return chooser.completions([row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)])


def _check(model: nn.Module, reason: str | None) -> None:
    if reason is not None:
        raise Forgets(
            "rollout_engine: 'compact' needs a model that keeps its context in the DynamicCache it is given, and "
            f"{type(base_model(model)).__name__} does not: {reason}; use 'generate'"
        )


def closed_up(going: Tensor) -> Tensor:
    """Where the rows that go on stand, (n,) int64 for a mask (R,): the last of them take the places that come free."""
    size = int(going.sum())
    places = torch.arange(size, device=going.device)
    places[~going[:size]] = size + going[size:].nonzero()[:, 0]
    return places
