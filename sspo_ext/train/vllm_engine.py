# SPDX-License-Identifier: Apache-2.0
"""vLLM as rollout engine, inside the trainer's own processes ("colocate").

Each process has one engine. Before every batch of rollouts the policy's weights are loaded into it. It needs a GPU and
`pip install vllm`, and is imported only when it is asked for.

vLLM does the sampling, from the seeds given to it: its rollouts are not those of `GenerateEngine`. The tests run this
module against a stand-in with vLLM's names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .model_call import hf_model
from .sampling import Sampling
from .sharded import whole


class VLLMEngine:
    """Completes prompts with vLLM.

    Args:
        model: A name or folder from which vLLM loads the architecture.
        **options: Arguments of `vllm.LLM`: gpu_memory_utilization (here 0.3 by default), max_model_len, dtype, ...
    """

    def __init__(self, model: str, **options: Any):
        # vLLM must run in this process, because the weights are handed over as tensors in memory.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM  # pyright: ignore[reportMissingImports]  # needs a GPU to be installed

        # "vllm": vLLM's own sampling settings, not those of the checkpoint's generation config
        defaults: dict[str, Any] = {"gpu_memory_utilization": 0.3, "generation_config": "vllm"}
        if "RANK" in os.environ:  # set by a launcher; by default every engine would take the first GPU
            defaults["distributed_executor_backend"] = "external_launcher"
        self.llm = LLM(model=model, **{**defaults, **options})

    def complete(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """See `RolloutEngine.complete`."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

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
        """Loads the policy's weights, with its adapters, into vLLM, and drops vLLM's cached prefixes."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(policy_weights(model))
        self.llm.reset_prefix_cache()


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights one after the other, under their names in the checkpoint.

    Sharded weights (FSDP2) are gathered one at a time. The weights of a layer with an adapter are copies into which the
    adapter is merged. The layer's own stay as they are, bit by bit: to merge and to unmerge would round them twice.

    Args:
        model: The policy, with or without an adapter.

    Returns:
        An iterator of (name, weight).

    Raises:
        ValueError: For adapters that cannot be merged: prompt learning, and `model.add_adapter` without a PeftModel.
    """
    kinds = getattr(model, "peft_config", None) or {}
    if kinds and not hasattr(model, "merge_adapter"):
        names = ", ".join(getattr(config.peft_type, "value", str(config.peft_type)) for config in kinds.values())
        raise ValueError(
            f"rollout_engine: 'vllm' takes a model's weights, into which {names} cannot be merged here; use 'generate'"
        )
    return _whole(_named_weights(hf_model(model).get_base_model() if kinds else model, ""))


def _whole(weights: Iterator[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The whole of each weight, tied weights once."""
    seen = set()
    for name, weight, value in weights:
        if weight not in seen:
            seen.add(weight)
            with torch.no_grad():
                yield name, whole(value.detach())


def _named_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Parameters under the names that they have without PEFT and without checkpoint wrappers, and their values."""
    parts = {name: part for name, part in module._modules.items() if part is not None}
    for inside in ("base_layer", "token_adapter", "_checkpoint_wrapped_module"):
        if inside in parts:  # everything beside it belongs to the adapter
            adapted = inside == "base_layer" and hasattr(module, "merge")
            yield from _merged(module, prefix) if adapted else _named_weights(parts[inside], prefix)
            return
    if "modules_to_save" in parts:
        copies = hf_model(parts["modules_to_save"])
        active = [copies[name] for name in hf_model(module).active_adapters if name in copies]
        yield from _named_weights(active[0] if active else parts["original_module"], prefix)
        return
    for name, weight in module._parameters.items():
        if weight is not None:
            yield prefix + name, weight, weight
    for name, part in parts.items():
        yield from _named_weights(part, f"{prefix}{name}.")


def _merged(layer: Any, prefix: str) -> list[tuple[str, Tensor, Tensor]]:
    """The weights of a layer, and copies of them with the layer's active adapters merged."""
    base = layer.base_layer
    before = list(_named_weights(base, prefix))
    if layer.merged or layer.disable_adapters:
        return before
    owners = {part: dict(part._parameters) for part in base.modules()}
    saved = {weight: _local(weight).clone() for weight in base.parameters()}
    try:
        layer.merge()
        merged = {name: whole(value.detach()).clone() for name, _, value in _named_weights(base, prefix)}
    finally:
        for part, parameters in owners.items():
            part._parameters.update(parameters)
        for weight, value in saved.items():
            _local(weight).copy_(value)
        layer.merged_adapters.clear()
    return [(name, weight, merged[name]) for name, weight, _ in before]


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this process has."""
    weight = weight.detach()
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()


def _one_seed(seed: Sequence[int]) -> int:
    """Mixes the numbers of a seed into one."""
    value = 0
    for part in seed:
        value = (value * 1_000_003 + part) % 2**31
    return value
