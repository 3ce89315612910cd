# SPDX-License-Identifier: Apache-2.0
"""Which engines a model supports: known refusals, and a check against separate forwards, once for each of them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..._checks import check_choice
from ...hf.wrappers import model_device, model_dtype, text_config
from ...tree import support as tree_support
from ...tree.example import Example, difference
from ...tree.inputs import tree_attention
from ...tree.masks import attention_of, is_beyond, window_of
from ...tree.support import model_name, refused_by_kind
from .branch import ALL_ENGINES, ENGINES, Branch
from .engines import run_engine

logger = logging.getLogger(__name__)

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()

_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


def choose_engine(model: nn.Module, engine: str, longest: int = 0, among: Sequence[str] = ENGINES) -> str:
    """Return the engine to run: `engine` itself, or for "auto" the first of `among` that the model supports.

    `longest` is the number of tokens of the longest path; beyond a sliding window other engines may be supported. An
    engine that was asked for by name and is not supported raises ValueError with the reason. If "auto" ends with
    "separate" and the model's kind does not explain why, a warning is logged once for the model.
    """
    check_choice("engine", engine, ("auto", *(ALL_ENGINES if among is ENGINES else among)))
    refused: dict[str, str] = {}
    chosen = engine
    for chosen in among if engine == "auto" else [engine]:
        reason = why_not(model, chosen, longest)
        if reason is None:
            break
        refused[chosen] = reason
    if engine in refused:
        raise ValueError(f"engine: {engine!r} cannot run {model_name(model)}: {refused[engine]}")
    if engine == "auto" and chosen == "separate":
        _warn_of_separate(model, refused, longest)
    return chosen


def _warn_of_separate(model: nn.Module, refused: dict[str, str], longest: int) -> None:
    known, key = _known.setdefault(model, {}), ("warned", is_beyond(text_config(model), longest))
    if key in known or all(_refusal(model, name, longest) for name in refused):
        return
    known[key] = None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    logger.warning(
        "%s: each path takes a forward of its own, as no other engine runs it (%s)", model_name(model), reasons
    )


def why_not(model: nn.Module, engine: str, longest: int = 0) -> str | None:
    """Tell why an engine of `branch_logps` cannot run a model.

    The first call runs the model on a few short made-up sequences. The answer is logged and kept as long as the model
    lives.

    Args:
        model: any Hugging Face causal LM, wrapped or not.
        engine: "packed", "shared", "cached" or "separate".
        longest: the number of tokens of the longest path that the engine shall run. It matters for models with a
            sliding window.

    Returns:
        None if the engine gives this model's log-probs, else the reason.

    Raises:
        ValueError: if the engine is unknown.

    Examples:
        >>> reason = why_not(model, "packed")  # None if the model supports it
    """
    check_choice("engine", engine, ALL_ENGINES)
    if engine == "separate":
        return None
    if engine == "shared":
        try:
            with tree_attention(model):
                return tree_support.why_not(model, longest)
        except tree_support.UnsupportedTree as error:
            return str(error)
    if engine == "packed":
        return tree_support.why_not(model, longest)
    config = text_config(model)
    beyond = is_beyond(config, longest)
    key = (beyond, attention_of(config), model_device(model), model_dtype(model))
    known = _known.setdefault(model, {})
    if key not in known:
        window = window_of(config) if beyond else None
        reason = _refusal(model, engine, longest)
        known[key] = difference(model, window, partial(_cached, model)) if reason is None else reason
        if known[key] is not None:
            logger.info("engine %s cannot run %s: %s", engine, model_name(model), known[key])
    return known[key]


def _refusal(model: nn.Module, engine: str, longest: int) -> str | None:
    """Return the reason that the model's kind gives against an engine, or None."""
    if engine == "packed":
        return refused_by_kind(model, longest)
    beyond = is_beyond(text_config(model), longest)
    return "a sliding window counts the places that the mask hides" if beyond else None


def _cached(model: nn.Module, example: Example) -> Tensor:
    branches = [Branch(trunk, cut, example.tail) for trunk, cut in example.cuts]
    return run_engine(model, example.trunks, branches, "cached", 1 << 30).tokens
