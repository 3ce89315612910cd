# SPDX-License-Identifier: Apache-2.0
"""What a model needs whose weights are shared out to the processes (FSDP2, ZeRO-3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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

    def anyone_works(this: bool) -> bool:
        flag = torch.tensor(float(this), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0

    def tell(module: nn.Module, args: tuple) -> None:
        if not idle:
            anyone_works(True)

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
        while anyone_works(False):
            idle_forward()
    finally:
        handle.remove()


def reshard(model: nn.Module) -> None:
    """Gives up the whole weights that FSDP2 keeps after a forward, so that every parameter is a DTensor again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
