# SPDX-License-Identifier: Apache-2.0
"""Which models run trees: known refusals, and a check against separate forwards, once for each model."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.wrappers import base_model, model_device, model_dtype, takes, text_config
from ..layout.tree import TokenTree
from .example import Example, difference, run_model
from .masks import EAGER, FLEX, FULL, SDPA, SLIDING, attention_of, is_beyond, tree_mask, window_of
from .tiles import TILED

logger = logging.getLogger(__name__)

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()


class UnsupportedTree(ValueError):
    """The model cannot run a tree. The message names the model's class, the reason and a way out."""


def why_not(model: nn.Module, longest: int = 0) -> str | None:
    """Tell why a model cannot run a `TokenTree` with the attention that it has now.

    The first call runs the model on a few short made-up sequences, and on a tree of them. The answer is logged and kept
    as long as the model lives.

    Args:
        model: any Hugging Face causal LM, wrapped or not.
        longest: the number of tokens of the longest sequence. It matters for models with a sliding window.

    Returns:
        None if the model gives the log-probs of separate forwards, else the reason.

    Examples:
        >>> from sspo_ext.tree import why_not
        >>> why_not(model) is None
        True
    """
    config = text_config(model)
    beyond = is_beyond(config, longest)
    key = (beyond, attention_of(config), model_device(model), model_dtype(model))
    known = _known.setdefault(model, {})
    if key not in known:
        reason = _refusal(model, config, beyond)
        window = window_of(config) if beyond else None
        known[key] = difference(model, window, lambda example: _run(model, example)) if reason is None else reason
        if known[key] is not None:
            logger.info("%s cannot run a tree: %s", model_name(model), known[key])
    return known[key]


def take_answer(model: nn.Module, longest: int, reason: str | None) -> None:
    """Let `why_not` answer what another process has found, for the attention that the model has now."""
    config = text_config(model)
    key = (is_beyond(config, longest), attention_of(config), model_device(model), model_dtype(model))
    _known.setdefault(model, {})[key] = reason


def refused_by_kind(model: nn.Module, longest: int = 0) -> str | None:
    """The reason of `why_not` that is known before the model runs, or None."""
    config = text_config(model)
    return _refusal(model, config, is_beyond(config, longest))


def model_name(model: nn.Module) -> str:
    """The class of the Hugging Face model inside all wrappers."""
    return type(base_model(model)).__name__


def check_positions(name: str, model: nn.Module, longest: int, tokens: str = "tokens") -> None:
    """Raise ValueError if a path of `longest` tokens does not fit into the model's table of positions (GPT-2, OPT).

    Without this check it is an index error on the host; on a GPU it is an assertion that leaves the device unusable.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or longest <= limit:
        return
    inner = base_model(model)
    get = getattr(inner, "get_input_embeddings", None)
    words = None if get is None else get()
    for module in inner.modules():
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        offset: Any = getattr(module, "offset", 0)
        if module.num_embeddings - offset == limit:
            raise ValueError(
                f"{name}: expected at most {limit} {tokens}, which is where the positions of {model_name(model)} end, "
                f"got {longest}"
            )


def _refusal(model: nn.Module, config: Any, beyond: bool) -> str | None:
    """Return the reason that the model's kind gives against a tree, or None."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    attention = attention_of(config)
    if kinds:
        return f"layers of type {', '.join(sorted(map(str, kinds)))} take no 4-D mask"
    if getattr(base_model(model), "_is_stateful", False):
        return "recurrent layers take no 4-D mask"
    if attention not in (SDPA, EAGER, FLEX, TILED):
        return f"attention {attention!r} takes no 4-D mask"
    if attention == FLEX and not getattr(base_model(model), "_supports_flex_attn", False):
        return f"its class does not support attention {attention!r}"
    if not takes(model, "position_ids"):
        return "it takes no position_ids"
    if beyond and getattr(config, "sliding_window", None) is None:
        return "its layers apply the window themselves, by place instead of position"
    return None


def _run(model: nn.Module, example: Example) -> Tensor:
    """The tail's log-probs, from one forward of a tree."""
    tree = TokenTree.from_sequences(example.sequences).to(model_device(model))
    inputs = {"position_ids": tree.position_ids, "attention_mask": tree_mask(model, tree)}
    logits = run_model(model, tree.input_ids, **inputs).flatten(0, 1)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    paths = tree.places()
    rows = torch.cat([path[-len(example.tail) - 1 : -1] for path in paths])
    return logps[rows, example.tail * len(paths)]
