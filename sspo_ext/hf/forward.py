# SPDX-License-Identifier: Apache-2.0
"""One forward of the outermost model, for its hidden states or for its logits at some positions.

The model runs as usual. A temporary pre-hook on its output embeddings keeps the hidden states that the LM head was
about to read, and gives the head only a part of them. So the model keeps its own router losses, casts and
communication, and the logits that nobody needs are never computed. No `forward` is copied or patched.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .wrappers import base_model, find_head, unsupported


def forward_hidden(model: nn.Module, **inputs: Any) -> tuple[Tensor, Any]:
    """Run a causal LM and return the hidden states that its LM head reads, with gradient.

    This equals `model(**inputs, use_cache=False)` with one difference: the head computes the first position only.

    Args:
        model: the outermost module (PEFT, DDP, FSDP2, ...), so that the hooks of all wrappers run.
        **inputs: the model's inputs: `input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`, ...

    Returns:
        hidden: (B, T, H) in the dtype and on the device in which the head would have read it. Multiply it by the weight
            of `model_head` after this call; another call of the head module itself breaks FSDP2.
        outputs: the model's outputs. `outputs.logits` is (B, 1, V); router losses and all else are complete.

    Raises:
        TypeError: if the inputs contain `labels` (the model would compute a loss of its own), `logits_to_keep` or
            `use_cache=True`.
        UnsupportedHead: if the model is compiled as a whole, calls its head not exactly once, or has hidden states at
            other positions than its inputs.

    Examples:
        >>> hidden, outputs = forward_hidden(model, input_ids=input_ids, attention_mask=attention_mask)
        >>> head = model_head(model)
        >>> out = linear_step_pref_loss(hidden, head.weight, layout, pairs, **head.options)
        >>> out.loss.backward()
    """
    outputs, call = run_with_head(model, inputs, _first_position)
    return call.hidden, outputs


def forward_logits_at(
    model: nn.Module, positions: Tensor, *, use_cache: bool = False, **inputs: Any
) -> tuple[Tensor, Any]:
    """Run a causal LM with its LM head at some positions only, and return their logits.

    The logits have the model's own scale and softcap, and a gradient where gradients are enabled.

    Args:
        model: the outermost module, as for `forward_hidden`.
        positions: (N,) int64 on the model's device: indices into the B * T flattened positions, in any order, with
            repeats allowed.
        use_cache: ask the model for its cache, which is then among the outputs.
        **inputs: the model's inputs, as for `forward_hidden`.

    Returns:
        logits: (N, V), equal to `model(**inputs).logits.flatten(0, 1)[positions]`.
        outputs: the model's outputs.

    Raises:
        TypeError: as `forward_hidden`.
        UnsupportedHead: as `forward_hidden`.

    Examples:
        >>> last = torch.arange(1, 5) * 16 - 1  # the last position of each of the 4 rows of 16 tokens
        >>> logits, _ = forward_logits_at(model, last, input_ids=input_ids)
        >>> logits.shape[0]
        4
    """
    outputs, _ = run_with_head(model, inputs, lambda hidden: hidden.flatten(0, 1)[positions][None], use_cache)
    return logits_of(outputs)[0], outputs


def logits_of(outputs: Any) -> Tensor:
    """Return the logits among a model's outputs, which may be a plain tuple."""
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


class HeadCall(NamedTuple):
    """One call of a model's LM head."""

    hidden: Tensor  # (B, T, H): what the head was about to read
    passed: Tensor  # what it read instead
    autocast: tuple[bool, torch.dtype]  # whether autocast was on, and its dtype


class _Tap:
    """Forward pre-hook of the head: keeps the head's input and passes on what `narrow` makes of it."""

    def __init__(self, narrow: Callable[[Tensor], Tensor]):
        self.narrow, self.calls, self.thread = narrow, 0, threading.get_ident()
        self.call: HeadCall | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # Another thread may call a shared model at the same time (generation beside training): leave that call alone.
        if threading.get_ident() != self.thread:
            return None
        self.calls += 1
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return None
        hidden, device = args[0], args[0].device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self.call = HeadCall(hidden, self.narrow(hidden), autocast)
        return (self.call.passed, *args[1:]), kwargs


def _first_position(hidden: Tensor) -> Tensor:
    return hidden[:, :1]


def run_with_head(
    model: nn.Module, inputs: dict[str, Any], narrow: Callable[[Tensor], Tensor], use_cache: bool = False
) -> tuple[Any, HeadCall]:
    """Run the model while its head reads `narrow(hidden)`; return the model's outputs and the head's call."""
    for name in ("labels", "logits_to_keep", "num_logits_to_keep"):
        if inputs.get(name) is not None:
            raise TypeError(f"{name}: expected no such input, since the head computes one position only")
    if inputs.get("use_cache"):
        raise TypeError("use_cache: expected False or nothing, since a training forward keeps no cache")
    inner, head = find_head(model)
    base = base_model(inner)
    parameters = inspect.signature(base.forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs = {**inputs, "use_cache": use_cache}
    tap = _Tap(narrow)
    # Appended, not prepended: the wrappers' hooks (FSDP2's cast and all-gather) come first, so we see what the head
    # would.
    handle = head.register_forward_pre_hook(tap, with_kwargs=True)
    try:
        outputs = model(**inputs)
    finally:
        handle.remove()
    if tap.calls != 1:
        raise unsupported(base, f"called its output embeddings {tap.calls} times in one forward (compiled code: 0)")
    if tap.call is None:
        raise unsupported(base, "gave its output embeddings something other than one (B, T, H) tensor")
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if isinstance(tokens, Tensor) and tap.call.hidden.shape[:2] != tokens.shape[:2]:
        shapes = f"{tuple(tap.call.hidden.shape)} for inputs of shape {tuple(tokens.shape)}"
        raise unsupported(base, f"has hidden states of shape {shapes} (virtual prompt tokens?)")
    return outputs, tap.call
