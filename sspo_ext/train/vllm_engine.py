# SPDX-License-Identifier: Apache-2.0
"""vLLM as rollout engine, inside the trainer's own processes ("colocate").

Each process has one engine, or one part of an engine (`tensor_parallel_size`). Before every batch of rollouts the
policy's weights are loaded into it, as tensors in memory. It needs a GPU and vLLM 0.33, and is imported only when it is
asked for.

vLLM does the sampling, from the seeds given to it: its rollouts are not those of `GenerateEngine`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from .._versions import check_version
from .policy_weights import policy_weights
from .vllm_requests import VERSION, Answer, Asked, VLLMRequests


class VLLMEngine(VLLMRequests):
    """Completes prompts with vLLM in this process.

    With `enable_sleep_mode=True` vLLM gives its memory back while the policy is updated: its weights, which the next
    rollouts bring along, and its cache.

    With `tensor_parallel_size=n`, n neighbouring processes of a launcher have one engine together. It completes the
    prompts of all of them, and each gets the answers to its own.

    Args:
        model: A name or folder from which vLLM loads the architecture.
        **options: Arguments of `vllm.LLM`: gpu_memory_utilization (here 0.3 by default), max_model_len, dtype,
            enable_sleep_mode, tensor_parallel_size, return_sampling_mask, ...

    Raises:
        ImportError: vLLM is not installed, or in another version.
        ValueError: An option does not fit the processes.
    """

    def __init__(self, model: str, **options: Any):
        check_version("vllm", VERSION)
        self._group = _neighbours(options)
        # vLLM must run in this process, because the weights are handed over as tensors in memory.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM  # pyright: ignore[reportMissingImports]  # needs a GPU to be installed

        defaults: dict[str, Any] = {
            "gpu_memory_utilization": 0.3,
            "generation_config": "vllm",  # vLLM's own sampling settings, not those of the checkpoint's file
            "enable_prefix_caching": True,  # a group has one prompt, and the states of a chain begin alike
            "logprobs_mode": "processed_logprobs",  # those of the distribution that tokens are drawn from
        }
        if "RANK" in os.environ:  # set by a launcher; by default every engine would take the first GPU
            defaults["distributed_executor_backend"] = "external_launcher"
        options = {**defaults, **options}
        self._sleeps, self._asleep = options.get("enable_sleep_mode", False), False
        self.llm = LLM(model=model, **options)

    def load_weights(self, model: nn.Module) -> None:
        """See `VLLMRequests.load_weights`."""
        if self._asleep:
            self.llm.wake_up(tags=["weights"])  # the cache comes later, when nothing is in memory twice
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy_weights(model)})
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vllm: its prefix cache could not be reset, and would serve what older weights wrote")

    def rest(self) -> None:
        """Puts vLLM to sleep, with `enable_sleep_mode`. Its weights are dropped."""
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=2)
            self._asleep, self._ready = True, False

    def _ask(self, asked: Sequence[Asked]) -> list[Answer]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        everyones, mine = list(asked), slice(None)
        if self._group is not None:
            parts: list[Any] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(parts, everyones, group=self._group)
            first = sum(map(len, parts[: dist.get_rank(self._group)]))
            everyones, mine = [one for part in parts for one in part], slice(first, first + len(asked))
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in everyones],
            sampling_params=[SamplingParams(**params) for _, params in everyones],
            use_tqdm=False,
        )
        return [_answer(output.outputs[0]) for output in outputs[mine]]


def _answer(output: Any) -> Answer:
    logps = [{token: found.logprob for token, found in at.items()} for at in output.logprobs]
    kept = None if output.sampling_mask is None else output.sampling_mask.token_ids
    return Answer(list(output.token_ids), logps, kept)


def _neighbours(options: dict[str, Any]) -> dist.ProcessGroup | None:
    """The processes that share an engine with this one; None: it has one of its own."""
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if options.get(name, 1) != 1:
            raise ValueError(f"rollout_options: expected {name} 1 in the trainer's processes, got {options[name]}")
    size = options.get("tensor_parallel_size", 1)
    if size == 1:
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % size:
        raise ValueError(
            f"rollout_options: expected a tensor_parallel_size that divides the {world} processes of the trainer, "
            f"each of which has a part of an engine, got {size}"
        )
    return cast(dist.ProcessGroup, dist.new_subgroups(size)[0])
