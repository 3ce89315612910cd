# SPDX-License-Identifier: Apache-2.0
"""Sampled continuations of many states: answers to a probe, candidates for the next step, the rest of a response."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import check_count, check_not_negative
from ...hf.cache import cache_input, cache_of, has_virtual_tokens
from ...hf.wrappers import eval_mode, model_device
from ...tree.support import check_positions
from .branch import SAMPLING_ENGINES, Branch, Trunks, check_branches
from .cache import cached_rows
from .model import logits_at
from .support import choose_engine


def sample_branches(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    num_samples: int,
    *,
    max_new_tokens: int,
    stop: Callable[[list[int]], bool] | None = None,
    eos_token_ids: Sequence[int] = (),
    temperature: float = 1.0,
    seed: int = 0,
    engine: str = "auto",
    max_tokens: int = 8192,
) -> list[list[list[int]]]:
    """Sample `num_samples` continuations of trunk[:cut] + ids for each branch.

    The random numbers of a continuation depend only on `seed`, the tokens before it and its number among the
    `num_samples`. So they are the same with every engine and in any batch.

    Args:
        model: any Hugging Face causal LM, wrapped or not. It runs in eval mode, and its modes are restored.
        trunks: lists of token ids.
        branches: any number of branches of each trunk, in any order; their `start` is not used.
        num_samples: continuations of each branch.
        max_new_tokens: a continuation's largest number of tokens.
        stop: stop(token ids so far) tells whether a continuation is complete.
        eos_token_ids: tokens that end a continuation.
        temperature: 0 takes the most probable token.
        seed: of the random numbers.
        engine: "cached" computes a trunk once and continues all of its branches side by side. "separate" runs each
            branch alone, without padding or mask. "auto" is "cached" where the model supports it.
        max_tokens: budget of a forward's cache in tokens. A forward has at least one branch with all of its samples.

    Returns:
        For each branch `num_samples` lists of token ids, each with the token that ended it.

    Raises:
        ValueError: if an argument is out of range, a branch has no token before its continuation, a path is longer than
            the model's table of positions, the model does not support the engine, or its logits are not finite.
        TypeError: if a number has the wrong type.
    """
    check_not_negative("temperature", temperature)
    check_count("num_samples", num_samples)
    check_count("max_new_tokens", max_new_tokens)
    check_branches(trunks, branches, max_tokens)
    for r, branch in enumerate(branches):
        if branch.cut + len(branch.ids) < 1:
            raise ValueError(f"branches: branch {r} has no token to continue from")
    result: list[list[list[int]]] = [[] for _ in branches]
    longest = max((b.cut + len(b.ids) for b in branches), default=1 - max_new_tokens) + max_new_tokens
    check_positions("trunks", model, longest - 1)
    with torch.no_grad(), eval_mode(model):
        run = {"separate": _separate, "cached": _cached}[choose_engine(model, engine, longest, SAMPLING_ENGINES)]
        for members, start in run(model, trunks, branches, num_samples, max_new_tokens, max_tokens):
            contexts = [[*trunks[branches[r].trunk][: branches[r].cut], *branches[r].ids] for r in members]
            draws = np.concatenate([_draws(seed, ids, num_samples, max_new_tokens) for ids in contexts])
            rows = _decode(model, start, draws, temperature, stop, set(eos_token_ids), max_new_tokens)
            for i, r in enumerate(members):
                result[r] = rows[i * num_samples : (i + 1) * num_samples]
    return result


def _draws(seed: int, context: Sequence[int], num_samples: int, length: int) -> np.ndarray:
    """Return (num_samples, length) uniform numbers that depend on the arguments alone."""
    key = zlib.crc32(np.asarray(context, np.int64).tobytes())
    return np.random.default_rng([seed, key, len(context)]).random((num_samples, length))


class _Places(NamedTuple):
    """Where rows of different lengths stand in the cache that they share."""

    mask: Tensor  # (R, tokens so far) int64
    positions: Tensor  # (R,) int64, of the last token


class _Decoding:
    """Rows that are being continued: logits (R, V) of their next token, and what the next forward needs."""

    def __init__(self, logits: Tensor, cache: Any, ids: Tensor, places: _Places | None = None):
        self.logits, self.cache, self.ids, self.places = logits, cache, ids, places

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, if the cache can drop rows."""
        if self.places is not None and len(rows) < len(self.ids):
            index = torch.tensor(rows, device=self.ids.device)
            self.cache.batch_select_indices(index)
            self.places, self.ids = _Places(*(x[index] for x in self.places)), self.ids[index]

    def feed(self, model: nn.Module, tokens: Tensor) -> None:
        """Append one token to each row and compute the logits after it."""
        inputs: dict[str, Any] = {}
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        if self.places is not None:
            mask = torch.cat([self.places.mask, torch.ones_like(tokens[:, None])], 1)
            self.places = _Places(mask, self.places.positions + 1)
            inputs = {"attention_mask": mask, "position_ids": self.places.positions[:, None]}
        if self.cache is not None:
            inputs |= cache_input(model, self.cache)
        ids = self.ids if self.cache is None else tokens[:, None]
        self.logits, outputs = logits_at(model, _last(ids), input_ids=ids, use_cache=self.cache is not None, **inputs)
        if self.cache is not None:
            self.cache = cache_of(outputs)


def _last(ids: Tensor) -> Tensor:
    """Return the flattened positions of the last token of each row."""
    return torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1


_Run = Iterator[tuple[list[int], _Decoding]]


def _separate(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    num_samples: int,
    max_new_tokens: int,
    max_tokens: int,
) -> _Run:
    device = model_device(model)
    for r, (trunk, cut, ids, _) in enumerate(branches):
        tokens = torch.tensor([[*trunks[trunk][:cut], *ids]] * num_samples, device=device)
        logits, outputs = logits_at(model, _last(tokens), input_ids=tokens, use_cache=True)
        yield [r], _Decoding(logits, None if has_virtual_tokens(model) else cache_of(outputs), tokens)


def _cached(
    model: nn.Module,
    trunks: Trunks,
    branches: Sequence[Branch],
    num_samples: int,
    max_new_tokens: int,
    max_tokens: int,
) -> _Run:
    every, each = range(len(branches)), (num_samples, max_new_tokens)
    for part in cached_rows(model, trunks, branches, every, max_tokens, to_sample=each):
        logits, outputs = logits_at(model, _last(part.ids), input_ids=part.ids, use_cache=True, **part.inputs)
        cache = cache_of(outputs)
        cache.batch_repeat_interleave(num_samples)
        mask, positions = part.inputs["attention_mask"], part.inputs["position_ids"][:, -1]
        logits, ids, mask, positions = (
            x.repeat_interleave(num_samples, 0) for x in (logits, part.ids, mask, positions)
        )
        yield part.members, _Decoding(logits, cache, ids, _Places(mask, positions))


def _decode(
    model: nn.Module,
    state: _Decoding,
    draws: np.ndarray,  # (R, max_new_tokens)
    temperature: float,
    stop: Callable[[list[int]], bool] | None,
    eos: set[int],
    max_new_tokens: int,
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(len(draws))]
    going = list(range(len(draws)))  # the row of the result for each row of the state
    done: set[int] = set()
    for i in range(max_new_tokens):
        tokens = _pick(state.logits, draws[going, i], temperature)
        for r, token in zip(going, tokens.tolist(), strict=True):
            if token < 0:
                raise ValueError("model: expected finite logits, got NaN or infinity")
            if r not in done:
                rows[r].append(token)
                if token in eos or stop is not None and stop(rows[r]):
                    done.add(r)
        if len(done) == len(rows) or i == max_new_tokens - 1:
            break
        if state.places is not None:
            kept = [j for j, r in enumerate(going) if r not in done]
            state.keep(kept)
            going, tokens = [going[j] for j in kept], tokens[kept]
        state.feed(model, tokens)
    return rows


def _pick(logits: Tensor, draws: np.ndarray, temperature: float) -> Tensor:
    """Return (R,) token ids: the first whose cumulative probability exceeds the draw; -1 for logits of NaN."""
    if temperature == 0:
        best, tokens = logits.max(-1)
        return tokens.where(best.isfinite(), -1)
    total = (logits.double() / temperature).softmax(-1).cumsum(-1)
    point = torch.from_numpy(draws).to(logits.device)[:, None] * total[:, -1:]
    tokens = torch.searchsorted(total, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens.where(total[:, -1].isfinite(), -1)
