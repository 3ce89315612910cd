# SPDX-License-Identifier: Apache-2.0
"""How completions are sampled, and what a rollout engine must offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .._checks import check_not_negative


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    `top_p` and `top_k` narrow the distribution that is sampled from. The loss does not know of it: its log-probs are
    those of the whole distribution.

    Attributes:
        max_completion_length: The most tokens of a completion, at least 1. The end of sequence counts as one.
        eos_token_ids: The tokens that end a completion.
        temperature: Divides the logits before sampling. 0 takes the most probable token.
        top_p: Nucleus sampling: the smallest set of tokens whose probabilities add up to `top_p`, in (0, 1].
        top_k: The `top_k` most probable tokens; 0 means all.

    Raises:
        ValueError: For a value out of its range.
        TypeError: For a temperature that is no number.

    Examples:
        >>> from sspo_ext.train.sampling import Sampling
        >>> Sampling(max_completion_length=256, eos_token_ids=(1,), temperature=0.7).top_p
        1.0
    """

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


@dataclass(frozen=True)
class Completions:
    """What an engine wrote, with the log-probs it drew its tokens with.

    Attributes:
        token_ids: The token ids of each completion; see `RolloutEngine.complete`.
        logps: For each completion the log-probs of its tokens in the distribution that they were drawn from: of the
            logits over the temperature, narrowed by `top_k` and `top_p` and normalised again. None: not known.
        kept: For each completion and each of its tokens, the ids of the tokens that `top_k` and `top_p` kept: lists or
            1-D integer tensors. None: all were kept, or it is not known.
    """

    token_ids: list[list[int]]
    logps: list[list[float]] | None = None
    kept: Sequence[Sequence[Sequence[int] | Tensor]] | None = None


class RolloutEngine(Protocol):
    """Anything that completes prompts. Pass yours to `SSPOTrainer(engine=...)`.

    An engine may have more: `logprobs(requests)`, with which it can be asked for values (`probe_engine`), and `rest()`,
    called before each update, to free memory.

    Examples:
        An engine that writes the same tokens after every prompt:

        >>> class Parrot:
        ...     def __init__(self, token_ids):
        ...         self.token_ids = token_ids
        ...
        ...     def complete(self, model, prompts, sampling, seeds):
        ...         return [self.token_ids[: sampling.max_completion_length] for _ in prompts]
    """

    def complete(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Writes one completion for each prompt.

        Args:
            model: The policy. It is in evaluation mode, and no gradient is recorded.
            prompts: The token ids of each prompt, without padding.
            sampling: How to draw, where to stop.
            seeds: For each prompt a few non-negative integers. Drawing from them alone makes a run repeatable.

        Returns:
            The token ids of each completion, in the order of the prompts: up to and with the first end of sequence,
            at most `sampling.max_completion_length`.
        """
        ...
