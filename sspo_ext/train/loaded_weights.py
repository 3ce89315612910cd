# SPDX-License-Identifier: Apache-2.0
"""Checks that a model got all of its weights from a checkpoint. Otherwise the missing ones would be random numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .sharded import everywhere

_SHARED = ("vblora_vector_bank", "prompt_encoder", ".tinylora_v.")


def check_loaded(
    model: nn.Module, where: str | os.PathLike, missing: Collection[str], unexpected: Iterable[str] = (), wrong=()
) -> None:
    """Checks what loading a state dict reported.

    Weights tied to a loaded one are there. Weights in the file of parts that the model does not have, such as a value
    head or a vision tower, are left out; of parts that it has, such as a bias or one more layer, they are an error:
    the config is not that of the weights.

    Args:
        model: The model, loaded.
        where: The checkpoint, for the message.
        missing: Names of weights that the checkpoint has not.
        unexpected: Names in the checkpoint that the model has not.
        wrong: The weights of another shape: for each its name, or its name and its shapes in checkpoint and model;
            transformers 4 gives names alone.

    Raises:
        ValueError: Naming the checkpoint and the weights.
    """
    for found in wrong:
        name, *shapes = [found] if isinstance(found, str) else found
        expected, got = tuple(model.state_dict()[name].shape), tuple(shapes[0]) if shapes else "another"
        raise ValueError(f"model: {str(where)!r}: weight {name}: expected shape {expected} by the config, got {got}")
    absent = _not_tied(model, missing)
    if absent:
        raise ValueError(f"model: {str(where)!r} lacks {_some(absent)}; they would be random numbers")
    extra = sorted(name for name in unexpected if _of_a_part(model, name))
    if extra:
        raise ValueError(f"model: {str(where)!r} has {_some(extra)}, for which the model of its config has no place")


@contextlib.contextmanager
def naming_the_adapter(where: str | os.PathLike) -> Iterator[None]:
    """Makes what PEFT raises for an adapter that does not fit a ValueError that names it."""
    try:
        yield
    except KeyError as error:  # of a module that was trained whole (modules_to_save)
        raise ValueError(f"model: adapter {str(where)!r} lacks weight {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(f"model: adapter {str(where)!r} does not fit its base model: {error}") from error


def check_adapter(model: Any, where: str | os.PathLike, adapter: str = "default") -> None:
    """Checks that an adapter's file has the weights of the adapter, and no others, by loading it again.

    PEFT warns of the former at the first time, and says nothing of the latter.

    Args:
        model: The PeftModel, loaded.
        where: The adapter's folder or name.
        adapter: The adapter's name in the model.

    Raises:
        ValueError: As in `check_loaded`.
    """
    with naming_the_adapter(where):
        found = model.load_adapter(str(where), adapter, is_trainable=True)
    # these are shared by all layers, or are not saved
    absent = [name for name in found.missing_keys if not any(part in name for part in _SHARED)]
    if absent:
        raise ValueError(f"model: adapter {str(where)!r} lacks {_some(sorted(absent))}; they would be random numbers")
    if found.unexpected_keys:
        raise ValueError(
            f"model: adapter {str(where)!r} has {_some(sorted(found.unexpected_keys))}, for which its base model has "
            "no place"
        )


def check_finite(model: nn.Module, when: str) -> None:
    """Checks the weights that are about to be saved: all, or with an adapter those that are trained.

    Args:
        model: The model.
        when: What happened to it, for the message.

    Raises:
        ValueError: For a weight that is not finite.
    """
    adapted = getattr(model, "peft_config", None) is not None
    weights = {
        name: getattr(weight, "ds_tensor", weight).detach()  # a process's part of it under ZeRO-3
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.element_size() > 1 and (weight.requires_grad or not adapted)
    }
    flags = [torch.isfinite(weight).all() for weight in weights.values()]
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        flags = [torch.tensor(flag) for flag in everywhere([bool(flag) for flag in flags])]
    # one wait for each device
    if flags and not all(flag.item() for flag in _together(flags)):
        name = next(name for name, flag in zip(weights, flags, strict=True) if not flag)
        raise ValueError(f"model: weight {name} is not finite {when}, so it is not saved; try a lower learning rate")


def _together(flags: list[torch.Tensor]) -> list[torch.Tensor]:
    devices = {flag.device for flag in flags}
    return [torch.stack([flag for flag in flags if flag.device == device]).all() for device in devices]


def _not_tied(model: nn.Module, missing: Collection[str]) -> list[str]:
    """The missing names whose tensor is that of no other name."""
    if not missing:
        return []
    state = model.state_dict(keep_vars=True)
    loaded = {id(weight) for name, weight in state.items() if name not in set(missing)}
    return sorted(name for name in missing if name not in state or id(state[name]) not in loaded)


def _of_a_part(model: nn.Module, name: str) -> bool:
    """Whether the model has a part, below its base model, to which a weight of that name would belong."""
    path, depth = name.split("."), 0
    module: nn.Module | None = model
    for part in path[:-1]:
        module = module._modules.get(part)
        if module is None:
            break
        depth += 1
    return depth > (path[0] == getattr(model, "base_model_prefix", ""))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} weights ({shown}{', ...' if len(names) > 3 else ''})"
