# SPDX-License-Identifier: Apache-2.0
"""What a model needs whose weights are shared out to the processes (FSDP2, ZeRO-3)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import nn

from ..hf.wrappers import base_model


@contextlib.contextmanager
def in_step(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Makes up for forwards that other processes run within the block, and this one does not.

    Every forward of a sharded model gathers its weights from all processes, so all of them have to run it. Before each
    forward a process tells the others that it still works. One that is done runs forwards of one token until all are.
    The model's first forward within the block is one of these, so that what FSDP2 keeps gathered after a forward is
    gathered on all processes.

    Args:
        model: The outermost module. All processes enter the block with the same model.
        device: The device of its inputs.

    Yields:
        Nothing.
    """

    def tell(module: nn.Module, args: tuple) -> None:
        if not idle:
            most(1, device)

    def idle_forward() -> None:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 1, dtype=torch.int64, device=device), use_cache=False)

    # what `generate` calls is the model inside PEFT's
    handle = base_model(model).register_forward_pre_hook(tell, prepend=True)
    try:
        idle = True
        idle_forward()
        idle = False
        yield
        idle = True
        while most(0, device):
            idle_forward()
    finally:
        handle.remove()


def shard(model: nn.Module, accelerator: Any) -> None:
    """Shards a model in place by FSDP2, as accelerate does when a training begins, and keeps its LM head whole.

    A model that is sharded from the start can be evaluated before it is trained, and never is whole on one process. If
    only the first process has loaded weights (`cpu_ram_efficient_loading`), the others get theirs.

    The weights of the head stay gathered from a forward to its backward, as the linear route needs them.

    Args:
        model: The model. The optimizer is made afterwards, of the sharded parameters.
        accelerator: Of accelerate, with FSDP2.

    Raises:
        ValueError: For a head that is tied to the embeddings, with accelerate 1.14, which would shard the weight twice.
    """
    from accelerate.utils import fsdp_utils
    from torch.distributed.fsdp import FSDPModule

    inner: Any = base_model(model)
    head = inner.get_output_embeddings()
    tied = head is not None and head.weight is inner.get_input_embeddings().weight
    if tied and accelerate.__version__.startswith("1.14."):
        raise ValueError(
            "accelerate: expected 1.15 or newer (or 1.13) for FSDP2 and a head that is tied to the embeddings, got "
            f"{accelerate.__version__}, which shards their weight twice"
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:
        model = fsdp_utils.fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False  # else it is applied once more when training begins
    fsdp_utils.fsdp2_prepare_model(accelerator, model)
    around = [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and any(part is head for part in module.modules())
    ]
    if around:  # the last one is the innermost
        around[-1].set_reshard_after_forward(False, recurse=False)


def partition(model: nn.Module, accelerator: Any, args: Any) -> Any:
    """Shares a model's weights out in place by ZeRO-3, as DeepSpeed does when a training begins.

    From then on every forward of the model gathers its weights. Before an optimizer is made, `destroy` of what is
    returned has to take the hooks away.

    Args:
        model: The model, whole or shared out when it was loaded.
        accelerator: Of accelerate, with DeepSpeed.
        args: Of Trainer. They fill in what is "auto" in DeepSpeed's config.

    Returns:
        DeepSpeed's engine, without an optimizer.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]  # the user's own choice

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.hf_ds_config)
    config.trainer_config_finalize(args, model, 0)
    for part in ("optimizer", "scheduler"):
        config.del_config_sub_tree(part)
    return deepspeed.initialize(model=model, config=config.config)[0]


def is_shared_out(weight: torch.Tensor) -> bool:
    """Whether a process has only a part of a weight, so that all of them have to gather it."""
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight without its gradient, gathered from all processes if FSDP2 or ZeRO-3 has shared it out."""
    if hasattr(weight, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        with GatheredParameters([weight]):
            return weight.detach().clone()
    gather = getattr(weight.detach(), "full_tensor", None)
    return weight.detach() if gather is None else gather()


def most(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    flag = torch.tensor(number, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag.item())


def everywhere(flags: list[bool]) -> list[bool]:
    """Which of the flags are True on all processes."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, flags)
    return [all(of_flag) for of_flag in zip(*found, strict=True)]


def reshard(model: nn.Module) -> None:
    """Gives up the whole weights that FSDP2 keeps after a forward, so that every parameter is a DTensor again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
