# SPDX-License-Identifier: Apache-2.0
"""Log-probs from an inference server over HTTP: an OpenAI-compatible one, vLLM's own field, or SGLang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .._checks import check_choice, check_count
from .._http import call, short
from ..signals.probing.requests import ProbeRequests

Pairs = Sequence[tuple[list[int], list[int]]]  # prompts and continuations of one call


class LogprobServer:
    """Asks a server for the log-probs of continuations after prompts, for `values_from_logprobs`.

    Requests go out in batches, several at once, in order: neighbours share prefixes, which a prefix cache then has.

        style     path             what is asked and read
        echo      /v1/completions  echo with logprobs: vLLM, SGLang and other OpenAI-compatible servers
        vllm      /v1/completions  vLLM's `prompt_logprobs`
        sglang    /generate        `logprob_start_len`, so that the prefix cache is used

    Where log-probs of a prompt are asked for, as "echo" and "vllm" do, vLLM does not read its prefix cache and computes
    the whole prompt. The server must have the policy's weights; nothing here hands them over, see
    `sspo_ext.train.vllm_server` for that.

    Args:
        url: where the server is, such as "http://127.0.0.1:8000".
        model: the model's name there; SGLang needs none.
        style: "echo", "vllm" or "sglang".
        batch_size: prompts of one call.
        workers: calls at once.
        timeout: seconds until a call fails.
        headers: of every call, such as {"Authorization": ...}.
        **body: further fields of every call.

    Raises:
        ValueError: An option does not fit.

    Examples:
        >>> from sspo_ext.integrations.servers import LogprobServer
        >>> server = LogprobServer("http://127.0.0.1:30000", style="sglang")
        >>> server.url
        'http://127.0.0.1:30000/generate'
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        style: str = "echo",
        batch_size: int = 64,
        workers: int = 4,
        timeout: float = 600.0,
        headers: dict[str, str] | None = None,
        **body: Any,
    ):
        check_choice("style", style, tuple(_STYLES))
        check_count("batch_size", batch_size)
        check_count("workers", workers)
        path, self._asks, self._reads = _STYLES[style]
        self.url, self.model, self.batch_size, self.workers = url.rstrip("/") + path, model, batch_size, workers
        self.timeout, self.body = timeout, body
        self.headers = headers or {}

    def logprobs(self, requests: ProbeRequests) -> list[list[float]]:
        """The log-probs of every request's continuation tokens.

        Args:
            requests: of `probe_requests`.

        Returns:
            For each request a number a token.

        Raises:
            ConnectionError: The server cannot be reached or refuses; the message has its answer.
            ValueError: The answer has not the form of the style, or lacks a number.
        """
        asked = list(zip(requests.prompts, requests.continuations, strict=True))
        batches = [asked[i : i + self.batch_size] for i in range(0, len(asked), self.batch_size)]
        with ThreadPoolExecutor(self.workers) as pool:
            return [found for some in pool.map(self._call, batches) for found in some]

    def _call(self, pairs: Pairs) -> list[list[float]]:
        body = {**self._asks(pairs), **({"model": self.model} if self.model else {}), **self.body}
        answer = call(self.url, body, headers=self.headers, timeout=self.timeout)
        try:
            found = self._reads(answer, pairs)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.url}: expected log-probs of the prompt in the answer, got {short(answer)} ({error!r})"
            ) from error
        for (_, continuation), some in zip(pairs, found, strict=True):
            if len(some) != len(continuation) or any(x is None for x in some):
                raise ValueError(f"{self.url}: expected {len(continuation)} log-probs, a token each, got {short(some)}")
        return found


def _whole(pairs: Pairs) -> list[list[int]]:
    return [[*prompt, *continuation] for prompt, continuation in pairs]


def _choices(answer: Any) -> list[Any]:
    return sorted(answer["choices"], key=lambda choice: choice["index"])


def _ask_echo(pairs: Pairs) -> dict[str, Any]:
    return {"prompt": _whole(pairs), "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1.0}


def _read_echo(answer: Any, pairs: Pairs) -> list[list[float]]:
    return [
        choice["logprobs"]["token_logprobs"][len(prompt) : len(prompt) + len(continuation)]
        for choice, (prompt, continuation) in zip(_choices(answer), pairs, strict=True)
    ]


def _ask_vllm(pairs: Pairs) -> dict[str, Any]:
    return {"prompt": _whole(pairs), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}


def _read_vllm(answer: Any, pairs: Pairs) -> list[list[float]]:
    # beside the prompt's own token each place may have the likeliest ones
    return [
        [
            at[str(token)]["logprob"]
            for at, token in zip(choice["prompt_logprobs"][len(prompt) :], continuation, strict=True)
        ]
        for choice, (prompt, continuation) in zip(_choices(answer), pairs, strict=True)
    ]


def _ask_sglang(pairs: Pairs) -> dict[str, Any]:
    return {
        "input_ids": _whole(pairs),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # the first log-prob given is that of the token after this place
        "logprob_start_len": [len(prompt) - 1 for prompt, _ in pairs],
    }


def _read_sglang(answer: Any, pairs: Pairs) -> list[list[float]]:
    return [
        [number for number, *_ in one["meta_info"]["input_token_logprobs"][-len(continuation) :]]
        for one, (_, continuation) in zip(answer, pairs, strict=True)
    ]


_STYLES: dict[str, tuple[str, Callable[[Pairs], dict[str, Any]], Callable[[Any, Pairs], list[list[float]]]]] = {
    "echo": ("/v1/completions", _ask_echo, _read_echo),
    "vllm": ("/v1/completions", _ask_vllm, _read_vllm),
    "sglang": ("/generate", _ask_sglang, _read_sglang),
}
