# SPDX-License-Identifier: Apache-2.0
"""Rollouts: completions sampled from the policy, behind an interface small enough for any engine.

A completion depends only on the policy, the row's prompt and the row's seed. Each token takes one uniform number, which
is mapped through the inverse of the cumulative distribution; torch's random state is not used. So rollouts are the same
for one process and for many, for any batch they are drawn in (up to rounding of the logits), and for an interrupted run
and an uninterrupted one.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import check_choice
from ..hf.cache import cache_input, why_no_cache
from ..hf.wrappers import base_model
from .sampling import RolloutEngine, Sampling

ENGINES = ("generate", "compact", "vllm")

_BELOW_ONE = 1 - 2**-24  # the greatest float32 below 1


def make_engine(name: str, tokenizer, *, rows_at_once: int | None = None, **options: Any) -> RolloutEngine:
    """Makes an engine by its name.

    Args:
        name: One of

            * "generate": Hugging Face's `generate`, for every model.
            * "compact": a loop over the key-value cache that drops rows as they end. It writes the same completions,
              sooner where lengths differ. The model's cache must be able to select rows.
            * "vllm": vLLM beside the policy. It batches by itself.
        tokenizer: Its padding token fills the batches.
        rows_at_once: The most rows in one batch; None means all. Not for "vllm".
        **options: For "vllm" alone: the arguments of `vllm.LLM`.

    Returns:
        The engine.

    Raises:
        ValueError: For an unknown name, or for options that the engine does not have.
    """
    check_choice("rollout_engine", name, ENGINES)
    if name != "vllm" and options:
        raise ValueError(f"rollout_options: rollout_engine {name!r} has none, got {', '.join(sorted(options))}")
    if name == "vllm":
        if rows_at_once is not None:
            raise ValueError(
                "rollout_batch_size: expected None with rollout_engine 'vllm', which makes its own batches "
                f"(max_num_seqs of rollout_options), got {rows_at_once}"
            )
        if options.get("tensor_parallel_size", 1) != 1:
            raise ValueError(
                "rollout_options: expected tensor_parallel_size 1, since every process completes prompts of its own, "
                f"got {options['tensor_parallel_size']}"
            )
        from .vllm_engine import VLLMEngine

        return VLLMEngine(**options)
    return (GenerateEngine if name == "generate" else CompactEngine)(tokenizer.pad_token_id or 0, rows_at_once)


class _BatchEngine(ABC):
    """An engine that completes at most `rows_at_once` rows in one batch."""

    def __init__(self, pad_token_id: int, rows_at_once: int | None = None):
        self.pad_token_id, self.rows_at_once = pad_token_id, rows_at_once

    @torch.no_grad()
    def complete(self, model, prompts, sampling: Sampling, seeds) -> list[list[int]]:
        """See `RolloutEngine.complete`."""
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected one for each of {len(prompts)} prompts, got {len(seeds)}")
        size = self.rows_at_once or max(len(prompts), 1)
        completions = []
        for i in range(0, len(prompts), size):
            completions += self._complete_batch(model, prompts[i : i + size], sampling, seeds[i : i + size])
        return completions

    @abstractmethod
    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> list[list[int]]: ...


class GenerateEngine(_BatchEngine):
    """`model.generate` on left-padded prompts."""

    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> list[list[int]]:
        from transformers import GenerationConfig, LogitsProcessorList

        inputs = left_padded(prompts, self.pad_token_id, _device(model))
        width = inputs["input_ids"].shape[1]
        choose = LogitsProcessorList([_ChooseOne(_Chooser(sampling, seeds, _device(model)), width)])
        config = GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, max_new_tokens=sampling.max_completion_length,
            eos_token_id=list(sampling.eos_token_ids), pad_token_id=self.pad_token_id,
        )  # fmt: skip
        with generation_config_of(model, config):
            # on a sharded model the trainer keeps processes in step, in all that calls the model
            out = model.generate(
                **inputs, logits_processor=choose, generation_config=config, synced_gpus=False
            )  # fmt: skip
        return [up_to_end(ids, sampling.eos_token_ids) for ids in out[:, width:].tolist()]


class CompactEngine(_BatchEngine):
    """A loop over the key-value cache. Rows that have ended are dropped from it."""

    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> list[list[int]]:
        from transformers import DynamicCache

        reason = why_no_cache(model)
        if reason is not None:
            raise ValueError(
                "rollout_engine: 'compact' needs a model that keeps its context in the DynamicCache it is given, and "
                f"{type(base_model(model)).__name__} does not: {reason}; use 'generate'"
            )
        device = _device(model)
        inputs = left_padded(prompts, self.pad_token_id, device)
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ends = torch.tensor(sampling.eos_token_ids, device=device)
        chooser, cache = _Chooser(sampling, seeds, device), DynamicCache()
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
        return [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]


class _Chooser:
    """Chooses one token for each row from the logits of the last position."""

    def __init__(self, sampling: Sampling, seeds: Sequence[Sequence[int]], device: torch.device):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.sampling = sampling
        self.narrow: list[Callable[..., Tensor]] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self.narrow += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        if sampling.temperature:
            draws = [np.random.default_rng(list(seed)).random(sampling.max_completion_length) for seed in seeds]
            self.uniform = torch.from_numpy(np.array(draws)).clamp(max=_BELOW_ONE).float().to(device)

    def __call__(self, logits: Tensor, rows: Tensor, t: int) -> Tensor:  # (n, V), (n,) -> (n,) int64
        if not self.sampling.temperature:
            return logits.argmax(-1)
        logits = logits.float() / self.sampling.temperature
        for warp in self.narrow:
            logits = warp(None, logits)
        cumulative = logits.softmax(-1).cumsum(-1)
        target = self.uniform[rows, t, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class _ChooseOne:
    """A logits processor for `generate` that leaves only the chosen token possible."""

    def __init__(self, chooser: _Chooser, prompt_width: int):
        self.chooser, self.width = chooser, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        drawn = self.chooser(scores, rows, input_ids.shape[1] - self.width)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


@contextlib.contextmanager
def generation_config_of(model: nn.Module, config: Any) -> Iterator[None]:
    """Gives a model another generation config meanwhile.

    `generate` takes what its own argument leaves open from the model's config, which comes from the checkpoint. That
    must not change what is drawn, since the loss does not know of it.

    Args:
        model: A model, with or without an adapter.
        config: A transformers.GenerationConfig.
    """
    owners = [vars(module) for module in model.modules() if "generation_config" in vars(module)]
    before = [owner["generation_config"] for owner in owners]
    for owner in owners:
        owner["generation_config"] = config
    try:
        yield
    finally:
        for owner, given in zip(owners, before, strict=True):
            owner["generation_config"] = given


def end_tokens(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The tokens that end a completion: those of the generation config, then the tokenizer's end of sequence."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    ends = tuple(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None))
    if not ends:
        raise ValueError("processing_class: expected an end-of-sequence token, which ends a completion; it has none")
    return ends


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """The model's inputs: input_ids and attention_mask, both (B, T) int64."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }


def up_to_end(ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """Returns `ids` up to and with the first end of sequence."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos_token_ids), len(ids)) + 1]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
