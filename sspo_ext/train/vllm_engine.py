"""vLLM as rollout engine, in the trainer's own processes ("colocate"): one engine a process, its weights loaded from
the policy before every batch of rollouts. Needs a GPU and `pip install vllm`; imported only when asked for.

This package's tests run it against a stand-in with vLLM's names, since vLLM needs a GPU. Its sampling differs from the
other engines': seeds are given to vLLM, and rollouts are not those that `GenerateEngine` draws.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sampling import Sampling


class VLLMEngine:
    """`model`: name or folder that vLLM loads the architecture from; `options` go to `vllm.LLM`
    (gpu_memory_utilization, max_model_len, dtype, ...)."""

    def __init__(self, model: str, **options: Any):
        # The weights are handed over in this process, which vLLM otherwise leaves for one of its own.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        defaults: dict[str, Any] = {"gpu_memory_utilization": 0.3}
        if "RANK" in os.environ:  # of a launcher; vLLM's own choice would have every engine take the first GPU
            defaults["distributed_executor_backend"] = "external_launcher"
        self.llm = LLM(model=model, **{**defaults, **options})

    def complete(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        from vllm import SamplingParams

        self.load_weights(model)
        params = [
            SamplingParams(
                n=1, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1,
                max_tokens=sampling.max_completion_length, stop_token_ids=list(sampling.eos_token_ids),
                seed=_one_seed(seed), detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        inputs = [{"prompt_token_ids": list(p)} for p in prompts]
        outputs = self.llm.generate(inputs, sampling_params=params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def load_weights(self, model: nn.Module) -> None:
        """Hands the policy's weights over, adapters merged for the moment of it, and drops cached prefixes."""
        merged = hasattr(model, "merge_adapter")
        if merged:
            model.merge_adapter()
        try:
            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.model.load_weights(policy_weights(model))
        finally:
            if merged:
                model.unmerge_adapter()
        self.llm.reset_prefix_cache()


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name as in the checkpoint, weight) one after the other; sharded weights (FSDP2) gathered one at a time. PEFT's
    own names and adapter weights are left out: merge first.

    Raises ValueError for adapters that have no merged form (prompt learning; `model.add_adapter` without a PeftModel).
    """
    kinds = getattr(model, "peft_config", None) or {}
    if kinds and not hasattr(model, "merge_adapter"):
        names = ", ".join(getattr(config.peft_type, "value", str(config.peft_type)) for config in kinds.values())
        raise ValueError(
            f"rollout_engine: 'vllm' takes a model's weights, into which {names} cannot be merged here; use 'generate'"
        )
    return _whole(_named_weights(model.get_base_model() if kinds else model, ""))


def _whole(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen = set()  # tied weights come once
    for name, weight in weights:
        if weight not in seen:
            seen.add(weight)
            with torch.no_grad():
                yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight.data


def _named_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names that they have without PEFT and without checkpoint wrappers."""
    parts = module._modules
    for inside in ("base_layer", "token_adapter", "_checkpoint_wrapped_module"):
        if inside in parts:  # whatever is beside it is the adapter's
            yield from _named_weights(parts[inside], prefix)
            return
    if "modules_to_save" in parts:
        copies = [parts["modules_to_save"][name] for name in module.active_adapters if name in parts["modules_to_save"]]
        yield from _named_weights(copies[0] if copies else parts["original_module"], prefix)
        return
    for name, weight in module._parameters.items():
        if weight is not None:
            yield prefix + name, weight
    for name, part in parts.items():
        if part is not None:
            yield from _named_weights(part, f"{prefix}{name}.")


def _one_seed(seed: Sequence[int]) -> int:
    value = 0
    for part in seed:
        value = (value * 1_000_003 + part) % 2**31
    return value
