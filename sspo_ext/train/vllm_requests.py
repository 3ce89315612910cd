# SPDX-License-Identifier: Apache-2.0
"""What vLLM is asked, inside this process or over HTTP, and what its answers say: completions and values' log-probs.

A probe's log-probs are not asked for as log-probs of a prompt (`prompt_logprobs`): for those vLLM computes the whole
prompt, whatever its prefix cache has. Each token of an answer is asked for by a request of its own instead: the state,
the probe and the answer's tokens before it are the prompt, one token is drawn, and `logprob_token_ids` names the token
whose log-prob is wanted. So the states of a chain, which begin alike, are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..signals.probing.requests import ProbeRequests
from .sampling import Completions, Sampling

VERSION = "0.33"  # of vLLM, that these calls are written for

Asked = tuple[list[int], dict[str, Any]]  # a prompt, and the arguments of vllm.SamplingParams


class Answer(NamedTuple):
    """What vLLM says to one request: tokens, log-probs by token at each place, and the tokens that were kept there."""

    token_ids: list[int]
    logps: Sequence[Mapping[int, float]]
    kept: Sequence[list[int]] | None


class VLLMRequests(ABC):
    """A rollout engine that vLLM stands behind. It has the policy's weights from one `complete` to the next."""

    _ready = False

    @abstractmethod
    def load_weights(self, model: nn.Module) -> None:
        """Hands the policy's weights, with its adapters, to vLLM, which forgets the prefixes that it has cached."""

    @abstractmethod
    def _ask(self, asked: Sequence[Asked]) -> list[Answer]:
        """VLLM's answers, in the order of what is asked."""

    def complete(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Completions:
        """See `RolloutEngine.complete`. `kept` is there if vLLM was started with `return_sampling_mask`."""
        self.load_weights(model)
        self._ready = True
        answers = self._ask([(list(p), _drawing(sampling, s)) for p, s in zip(prompts, seeds, strict=True)])
        logps = [[at[token] for at, token in zip(a.logps, a.token_ids, strict=True)] for a in answers]
        kept = [a.kept for a in answers if a.kept is not None]
        return Completions([a.token_ids for a in answers], logps, kept if kept and len(kept) == len(answers) else None)

    def logprobs(self, requests: ProbeRequests) -> list[list[float]]:
        """The log-probs of every request's continuation tokens, by the weights of the last `complete`.

        Args:
            requests: of `probe_requests`.

        Returns:
            For each request a number a token.

        Raises:
            RuntimeError: vLLM has no weights: nothing was completed yet, or since `rest`.
        """
        if not self._ready:
            raise RuntimeError("logprobs: expected a call of complete before, which hands over the policy's weights")
        pairs = [
            [((*prompt, *continuation[:i]), token) for i, token in enumerate(continuation)]
            for prompt, continuation in zip(requests.prompts, requests.continuations, strict=True)
        ]
        wanted: dict[tuple[int, ...], dict[int, None]] = {}  # answers that begin alike are asked for once
        for prompt, token in (pair for some in pairs for pair in some):
            wanted.setdefault(prompt, {})[token] = None
        answers = self._ask([(list(prompt), _scoring(list(tokens))) for prompt, tokens in wanted.items()])
        found = {prompt: answer.logps[0] for prompt, answer in zip(wanted, answers, strict=True)}
        return [[found[prompt][token] for prompt, token in some] for some in pairs]


def _drawing(sampling: Sampling, seed: Sequence[int]) -> dict[str, Any]:
    return {
        "n": 1, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "max_tokens": sampling.max_completion_length, "stop_token_ids": list(sampling.eos_token_ids),
        "ignore_eos": True,  # what ends a completion is above
        "seed": _one_seed(seed), "logprobs": 0, "detokenize": False,
    }  # fmt: skip


def _scoring(tokens: list[int]) -> dict[str, Any]:
    return {
        "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 1, "ignore_eos": True, "seed": 0,
        "logprobs": len(tokens), "logprob_token_ids": tokens, "detokenize": False,
    }  # fmt: skip


def _one_seed(seed: Sequence[int]) -> int:
    """Mixes the numbers of a seed into one."""
    value = 0
    for part in seed:
        value = (value * 1_000_003 + part) % 2**31
    return value
