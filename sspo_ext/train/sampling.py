"""How completions are sampled, and what a rollout engine must offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from .._checks import check_not_negative


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy; `top_p`, `top_k` narrow the distribution before drawing
    (and then the loss's log-probs are not those that were drawn from)."""

    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        check_not_negative("temperature", self.temperature)
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length: expected at least 1, got {self.max_completion_length}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")


class RolloutEngine(Protocol):
    """Anything that completes prompts."""

    def complete(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Token ids of one completion to each prompt, up to and with the end of sequence, at most
        `sampling.max_completion_length`. `seeds`: some non-negative integers for each row."""
        ...
