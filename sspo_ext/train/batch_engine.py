# SPDX-License-Identifier: Apache-2.0
"""What the engines share that complete padded batches of prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .sampling import Completions, Sampling


class BatchEngine(ABC):
    """An engine that completes at most `rows_at_once` rows in one batch."""

    def __init__(self, pad_token_id: int, rows_at_once: int | None = None):
        self.pad_token_id, self.rows_at_once = pad_token_id, rows_at_once

    @torch.no_grad()
    def complete(self, model, prompts, sampling: Sampling, seeds) -> list[list[int]] | Completions:
        """See `RolloutEngine.complete`."""
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected one for each of {len(prompts)} prompts, got {len(seeds)}")
        size = self.rows_at_once or max(len(prompts), 1)
        parts = [
            self._complete_batch(model, prompts[i : i + size], sampling, seeds[i : i + size])
            for i in range(0, len(prompts), size)
        ]
        if not (sampling.logps or sampling.kept):
            return [ids for part in parts for ids in part.token_ids]
        return Completions(*(_joined([getattr(part, field.name) for part in parts]) for field in fields(Completions)))

    @abstractmethod
    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> Completions: ...


def _joined(parts: list) -> Any:
    """The lists of all batches as one; None where there are none."""
    return None if None in parts else [one for part in parts for one in part]


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """The model's inputs: input_ids and attention_mask, both (B, T) int64."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device
