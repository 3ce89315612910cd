# SPDX-License-Identifier: Apache-2.0
"""Rollouts: completions sampled from the policy, behind an interface small enough for any engine.

A completion depends only on the policy, the row's prompt and the row's seed. Each token takes one uniform number, which
is mapped through the inverse of the cumulative distribution; torch's random state is not used. So rollouts are the same
for one process and for many, for any batch they are drawn in (up to rounding of the logits), and for an interrupted run
and an uninterrupted one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .._checks import check_choice
from .batch_engine import BatchEngine, device_of, left_padded
from .compact_engine import CompactEngine
from .drawing import ChooseOne, Chooser
from .sampling import Completions, RolloutEngine, Sampling

ENGINES = ("auto", "compact", "generate", "vllm", "vllm_server")
OWN_BATCHES = ("vllm", "vllm_server")


def make_engine(name: str, tokenizer, *, rows_at_once: int | None = None, **options: Any) -> RolloutEngine:
    """Makes an engine by its name.

    Args:
        name: One of

            * "auto": "compact" where the model allows it, else "generate".
            * "compact": a loop over the key-value cache that reads a prompt once for its group and drops rows as they
              end. It writes the same completions, sooner. The model must keep its context in a DynamicCache.
            * "generate": Hugging Face's `generate`, for every model.
            * "vllm": vLLM beside the policy, see `sspo_ext.train.vllm_engine`. It batches by itself.
            * "vllm_server": a vLLM server on other GPUs, see `sspo_ext.train.vllm_server`.
        tokenizer: Its padding token fills the batches.
        rows_at_once: The most rows in one batch; None means all. Not for vLLM.
        **options: For "vllm" the arguments of `vllm.LLM`, for "vllm_server" those of `VLLMServer`.

    Returns:
        The engine.

    Raises:
        ValueError: For an unknown name, or for options that the engine does not have.
    """
    check_choice("rollout_engine", name, ENGINES)
    if name not in OWN_BATCHES and options:
        raise ValueError(f"rollout_options: rollout_engine {name!r} has none, got {', '.join(sorted(options))}")
    if name in OWN_BATCHES:
        if rows_at_once is not None:
            raise ValueError(
                f"rollout_batch_size: expected None with rollout_engine {name!r}, which makes its own batches "
                f"(vLLM's max_num_seqs), got {rows_at_once}"
            )
        needed = "model" if name == "vllm" else "url"
        if needed not in options:
            raise ValueError(f"rollout_options: expected {needed!r} with rollout_engine {name!r}, got {options}")
        if name == "vllm":
            from .vllm_engine import VLLMEngine

            return VLLMEngine(**options)
        from .vllm_server import VLLMServer

        return VLLMServer(**options)
    generate = GenerateEngine(tokenizer.pad_token_id or 0, rows_at_once)
    if name == "generate":
        return generate
    return CompactEngine(generate.pad_token_id, rows_at_once, otherwise=generate if name == "auto" else None)


def rest(engine: RolloutEngine) -> None:
    """Tells an engine that nothing is asked until the next completions. One without `rest` has nothing to free."""
    getattr(engine, "rest", lambda: None)()


class GenerateEngine(BatchEngine):
    """`model.generate` on left-padded prompts."""

    def _complete_batch(self, model, prompts, sampling: Sampling, seeds) -> Completions:
        from transformers import GenerationConfig, LogitsProcessorList

        inputs = left_padded(prompts, self.pad_token_id, device_of(model))
        width = inputs["input_ids"].shape[1]
        chooser = Chooser(sampling, seeds, device_of(model))
        choose = LogitsProcessorList([ChooseOne(chooser, width)])
        config = GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, max_new_tokens=sampling.max_completion_length,
            eos_token_id=list(sampling.eos_token_ids), pad_token_id=self.pad_token_id,
        )  # fmt: skip
        with generation_config_of(model, config):
            # on a sharded model the trainer keeps processes in step, in all that calls the model
            out = model.generate(
                **inputs, logits_processor=choose, generation_config=config, synced_gpus=False
            )  # fmt: skip
        return chooser.completions([up_to_end(ids, sampling.eos_token_ids) for ids in out[:, width:].tolist()])


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


def up_to_end(ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """Returns `ids` up to and with the first end of sequence."""
    return ids[: next((i for i, token in enumerate(ids) if token in eos_token_ids), len(ids)) + 1]
