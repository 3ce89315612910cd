# SPDX-License-Identifier: Apache-2.0
"""A rollout engine of our own: a loop over the key-value cache that drops rows as they end."""

from __future__ import annotations

import torch

from ..hf.cache import cache_input, why_no_cache
from ..hf.wrappers import base_model
from .batch_engine import BatchEngine, device_of, left_padded
from .drawing import Chooser
from .sampling import Completions, Sampling


class CompactEngine(BatchEngine):
    """A loop over the key-value cache. Rows that have ended are dropped from it."""

    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> Completions:
        from transformers import DynamicCache

        reason = why_no_cache(model)
        if reason is not None:
            raise ValueError(
                "rollout_engine: 'compact' needs a model that keeps its context in the DynamicCache it is given, and "
                f"{type(base_model(model)).__name__} does not: {reason}; use 'generate'"
            )
        device = device_of(model)
        inputs = left_padded(prompts, self.pad_token_id, device)
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ends = torch.tensor(sampling.eos_token_ids, device=device)
        chooser, cache = Chooser(sampling, seeds, device), DynamicCache()
        kept = cache_input(model, cache)
        rows = torch.arange(len(ids), device=device)
        tokens = torch.full((len(ids), sampling.max_completion_length), self.pad_token_id, device=device)
        lengths = torch.zeros(len(ids), dtype=torch.int64, device=device)
        for t in range(sampling.max_completion_length):
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **kept
            )
            if t == 0 and cache.get_seq_length() != ids.shape[1]:
                raise ValueError(
                    "rollout_engine: 'compact' needs a model that keeps its context in the DynamicCache it is given, "
                    f"and {type(model).__name__} kept {cache.get_seq_length()} of {ids.shape[1]} tokens there; use "
                    "'generate'"
                )
            drawn = chooser(out.logits[:, -1], rows, t)
            tokens[rows, t] = drawn
            lengths[rows] = t + 1
            going = (~torch.isin(drawn, ends)).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, drawn, mask, positions = rows[going], drawn[going], mask[going], positions[going]
            ids, positions = drawn[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        return chooser.completions([row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)])
