"""What stands around a model: wrappers to look through, heads to find, and models to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Virtual tokens of these come before the text in the logits.
_PREPENDS_POSITIONS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT")

_WAY_OUT = "use route='logits'"


class UnsupportedHead(ValueError):
    """The logits are not softcap(scale * (hidden @ weight.T + bias)) of a plain weight; says why, and a way out."""


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face or PEFT model inside DDP, FSDP1, DeepSpeed and torch.compile wrappers, or the model itself."""
    while True:
        for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
            if name in model._modules and not hasattr(type(model), "get_output_embeddings"):
                model = model._modules[name]
                break
        else:
            return model


def _find_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(Hugging Face or PEFT model, its output embeddings), after the checks that need no weight."""
    if isinstance(model, nn.DataParallel):
        raise _unsupported(model, "runs replicas of the model in threads", "use DistributedDataParallel")
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
        raise _unsupported(model, "with static_graph=True reduces gradients only through its own outputs", "unset it")
    inner = unwrap(model)
    if "_fsdp_wrapped_module" in model._modules:
        # Its options decide whether the weight is whole after a forward, and not on all ranks alike.
        raise _unsupported(inner, "is wrapped in FSDP1", "use FSDP2 (fully_shard)")
    for module in (model, inner):
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise _unsupported(
                inner,
                "is compiled as a whole, and a graph compiled earlier ignores a new hook",
                "compile its decoder (model.model.compile()) or its layers instead",
            )
    for config in getattr(inner, "peft_config", {}).values():
        kind = getattr(config, "peft_type", None)
        if getattr(kind, "value", kind) in _PREPENDS_POSITIONS:
            raise _unsupported(inner, f"prepends virtual tokens to the logits ({getattr(kind, 'value', kind)})")
    get = getattr(inner, "get_output_embeddings", None)
    head = None if get is None else get()
    if not isinstance(head, nn.Module):
        raise _unsupported(inner, "has no output embeddings (get_output_embeddings() gives none)")
    return inner, head


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _unsupported(model: nn.Module, what: str, way_out: str | None = None) -> UnsupportedHead:
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return UnsupportedHead(f"{type(model).__name__}: {what}; {f'{way_out}, or ' if way_out else ''}{_WAY_OUT}")
