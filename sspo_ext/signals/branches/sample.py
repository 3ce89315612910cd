"""Short continuations of many states: probe answers, candidates for the next step, the rest of a response."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import check_count, check_not_negative
from ...hf.wrappers import eval_mode
from .branch import SAMPLING_ENGINES, Branch, Trunks, by_trunk, check_branches, in_budget
from .cache import Grown, holes, prefill, repeat_cache
from .model import logits_at, model_device
from .support import check_positions, choose_engine


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
    """For each branch, `num_samples` continuations of trunk[:cut] + ids: token ids, with the one that stopped it.

    A continuation ends with a token of `eos_token_ids`, when `stop(its ids so far)` is true, or after `max_new_tokens`.
    Temperature 0 takes the most probable token. The random numbers of a continuation come from `seed`, the tokens
    before it and its own number among the `num_samples`, so they are the same by every engine and in any batch.

    engine      "cached" computes a trunk once, and continues all of its branches side by side; "separate" runs each
                branch by itself, without padding or mask; "auto" is "cached" where the model supports it
    max_tokens  budget of a forward's cache, in tokens (one branch with all of its samples at least)
    """
    check_not_negative("temperature", temperature)
    check_count("num_samples", num_samples)
    check_count("max_new_tokens", max_new_tokens)
    check_branches(trunks, branches, max_tokens)
    for r, branch in enumerate(branches):
        if branch.cut + len(branch.ids) < 1:
            raise ValueError(f"branches: branch {r} has no token to go on from")
    result: list[list[list[int]]] = [[] for _ in branches]
    longest = max((b.cut + len(b.ids) for b in branches), default=1 - max_new_tokens) + max_new_tokens
    check_positions(model, longest - 1)
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
    """(num_samples, length) uniform numbers that depend on the arguments alone."""
    key = zlib.crc32(np.asarray(context, np.int64).tobytes())
    return np.random.default_rng([seed, key, len(context)]).random((num_samples, length))


class _Start:
    """Where decoding starts: logits (R, V) of the next token, and what the forward after it needs."""

    def __init__(self, logits: Tensor, cache: Any, mask: Tensor | None, positions: Tensor | None, ids: Tensor):
        self.logits, self.cache, self.mask, self.positions, self.ids = logits, cache, mask, positions, ids

    def keep(self, rows: list[int]) -> None:
        """Only these go on, where the cache can drop the others."""
        if self.mask is not None and len(rows) < len(self.ids):
            index = torch.tensor(rows, device=self.ids.device)
            self.cache.batch_select_indices(index)
            self.mask, self.positions, self.ids = self.mask[index], self.positions[index], self.ids[index]

    def feed(self, model: nn.Module, tokens: Tensor) -> None:
        inputs: dict[str, Any] = {}
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(tokens[:, None])], 1)
            self.positions = self.positions + 1
            inputs = {"attention_mask": self.mask, "position_ids": self.positions[:, None]}
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        ids = self.ids if self.cache is None else tokens[:, None]
        last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
        self.logits, outputs = logits_at(model, last, input_ids=ids, use_cache=self.cache is not None, **inputs)
        if self.cache is not None:
            self.cache = outputs.past_key_values


_Run = Iterator[tuple[list[int], _Start]]


def _separate(model, trunks: Trunks, branches, num_samples: int, max_new_tokens: int, max_tokens: int) -> _Run:
    device = model_device(model)
    for r, (trunk, cut, ids, _) in enumerate(branches):
        tokens = torch.tensor([[*trunks[trunk][:cut], *ids]] * num_samples, device=device)
        last = torch.arange(1, num_samples + 1, device=device) * tokens.shape[1] - 1
        logits, outputs = logits_at(model, last, input_ids=tokens, use_cache=True)
        cache = getattr(outputs, "past_key_values", None)
        yield [r], _Start(logits, cache, None, None, tokens)


def _cached(model, trunks: Trunks, branches, num_samples: int, max_new_tokens: int, max_tokens: int) -> _Run:
    device = model_device(model)
    for members in by_trunk(branches, range(len(branches)), None):
        grown = {r: Grown.of(trunks, branches[r], all_ids=True) for r in members}
        prefix = trunks[branches[members[0]].trunk][: max(g.cut for g in grown.values())]
        cache = prefill(model, prefix)
        members.sort(key=lambda r: len(grown[r].ids), reverse=True)
        sizes = [num_samples * (len(prefix) + len(grown[r].ids) + max_new_tokens) for r in members]
        chunks = list(in_budget(sizes, max_tokens))
        for c, some in enumerate(chunks):
            chosen = members[some.start : some.stop]
            rows = [grown[r] for r in chosen]
            width = len(rows[0].ids)
            ids = torch.tensor([[*[0] * (width - len(g.ids)), *g.ids] for g in rows], device=device)
            lengths = [len(g.ids) for g in rows]
            mask, positions = holes(len(prefix), [g.cut for g in rows], lengths, width, device, left=True)
            inputs = {"attention_mask": mask, "position_ids": positions}
            last = torch.arange(1, len(rows) + 1, device=device) * width - 1
            spread = repeat_cache(cache, len(rows), last=c == len(chunks) - 1)
            logits, outputs = logits_at(model, last, input_ids=ids, use_cache=True, **inputs, **spread)
            outputs.past_key_values.batch_repeat_interleave(num_samples)
            logits, mask, ids = (x.repeat_interleave(num_samples, 0) for x in (logits, mask, ids))
            positions = positions[:, -1].repeat_interleave(num_samples)
            yield chosen, _Start(logits, outputs.past_key_values, mask, positions, ids)


def _decode(
    model: nn.Module,
    state: _Start,
    draws: np.ndarray,  # (R, max_new_tokens)
    temperature: float,
    stop: Callable[[list[int]], bool] | None,
    eos: set[int],
    max_new_tokens: int,
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(len(draws))]
    going = list(range(len(draws)))  # the row of the result that each row of the state is
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
        if state.mask is not None:
            kept = [j for j, r in enumerate(going) if r not in done]
            state.keep(kept)
            going, tokens = [going[j] for j in kept], tokens[kept]
        state.feed(model, tokens)
    return rows


def _pick(logits: Tensor, draws: np.ndarray, temperature: float) -> Tensor:
    """(R,) token ids: the first whose cumulative probability exceeds the draw; -1 where no token has a probability."""
    if temperature == 0:
        best, tokens = logits.max(-1)
        return tokens.where(best.isfinite(), -1)
    total = (logits.double() / temperature).softmax(-1).cumsum(-1)
    point = torch.from_numpy(draws).to(logits.device)[:, None] * total[:, -1:]
    tokens = torch.searchsorted(total, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens.where(total[:, -1].isfinite(), -1)
