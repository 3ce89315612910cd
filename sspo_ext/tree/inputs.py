# SPDX-License-Identifier: Apache-2.0
"""A tree as the inputs of a model, and a model whose attention takes a tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._checks import check_choice, check_kind
from ..hf.wrappers import base_model, model_device, text_config, unwrap
from ..layout.tree import TokenTree
from .masks import EAGER, FLEX, SDPA, attention_of, tree_mask
from .support import UnsupportedTree, check_positions, model_name, why_not
from .tiles import TILED, register


def tree_inputs(model: nn.Module, tree: TokenTree) -> dict[str, Any]:
    """Make the model's inputs for a tree: `model(**tree_inputs(model, tree))` gives logits of shape (R, L, V).

    The logits at the place of a token are those of its sequence alone: `tree.host_place` names the places.

    Args:
        model: any Hugging Face causal LM, wrapped or not. Its attention is "sdpa", "eager" or "flex_attention"; see
            `tree_attention` for others. The first call checks the model on an example; see `why_not`.
        tree: the tree, on the host or on the model's device.

    Returns:
        `input_ids`, `position_ids` and `attention_mask` on the model's device. The mask is a BlockMask for
        FlexAttention, made without an (L, L) tensor, and an (R, 1, L, L) tensor otherwise. A model with two kinds of
        layers gets a dict of them.

    Raises:
        UnsupportedTree: if the model cannot run a tree, or asks for the loss of its routers.
        ValueError: if a sequence is longer than the model's table of positions.

    Examples:
        >>> tree = TokenTree.from_sequences([[5, 6, 7], [5, 6, 8, 9]])
        >>> model(**tree_inputs(model, tree)).logits.shape[:2]
        torch.Size([1, 5])
    """
    check_kind("tree", tree, TokenTree, "a TokenTree")
    longest = tree.longest
    check_positions("tree", model, longest)
    reason = why_not(model, longest)
    if reason is not None:
        raise _unsupported(model, reason, "use it inside `with tree_attention(model)`, or run the sequences unshared")
    if getattr(getattr(unwrap(model), "config", None), "output_router_logits", False):
        way_out = "set model.config.output_router_logits = False, or run the sequences unshared"
        raise _unsupported(model, "the loss of its routers takes a 2-D mask (output_router_logits=True)", way_out)
    tree = tree.to(model_device(model))
    return {
        "input_ids": tree.input_ids,
        "position_ids": tree.position_ids,
        "attention_mask": tree_mask(model, tree),
    }


@contextmanager
def tree_attention(model: nn.Module, attention: str = "auto") -> Iterator[str]:
    """Give a model an attention that takes trees, and its own back at the end.

    Run the backward pass inside too: gradient checkpointing runs layers again.

    Args:
        model: any Hugging Face causal LM, wrapped or not.
        attention: "flex_attention", "sspo_tree", "sdpa" or "eager". "sspo_tree" is SDPA that computes only what a token
            sees, for CPUs. "auto" takes the first that the model supports: FlexAttention on a GPU, unless the model has
            attention dropout, which it lacks; "sspo_tree" on a CPU in place of SDPA; then the model's own; then SDPA,
            then eager.

    Yields:
        The name of the attention.

    Raises:
        UnsupportedTree: if the model supports none. The message has the reason for each.

    Examples:
        >>> with tree_attention(model) as attention:
        ...     attention
        'sspo_tree'
    """
    check_choice("attention", attention, ("auto", FLEX, TILED, SDPA, EAGER))
    config = text_config(model)
    refused: dict[str, str] = {}
    with _own_attention(model):
        for name in _candidates(model, config) if attention == "auto" else [attention]:
            reason = _set_attention(model, name) or why_not(model)
            if reason is None:
                yield name
                return
            refused[name] = reason
    reasons = "; ".join(f"with {name}: {reason}" for name, reason in refused.items())
    raise _unsupported(model, reasons, "run the sequences unshared")


@contextmanager
def using_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Give a model the attention that `tree_attention` has found before, without its checks."""
    with _own_attention(model):
        _set_attention(model, name)
        yield


@contextmanager
def _own_attention(model: nn.Module) -> Iterator[None]:
    """Give the model its own attention back at the end."""
    config = text_config(model)
    own = attention_of(config)
    try:
        yield
    finally:
        if attention_of(config) != own:
            config._attn_implementation = own  # unchecked: the model came with it


def _candidates(model: nn.Module, config: Any) -> list[str]:
    dropout = any(
        getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout")
    )
    own = attention_of(config)
    found = [FLEX] if model_device(model).type == "cuda" and not dropout else []
    found += [TILED] if own == SDPA and model_device(model).type == "cpu" else []
    # FlexAttention has no backward on the CPU.
    found += [own] if own in (SDPA, EAGER) or own == FLEX and model_device(model).type != "cpu" else []
    return list(dict.fromkeys([*found, SDPA, EAGER]))


def _set_attention(model: nn.Module, name: str) -> str | None:
    """Set the decoder's attention; return why that is impossible, or None."""
    config = text_config(model)
    if attention_of(config) == name:
        return None
    if name == TILED:
        register()
    base: Any = base_model(model)
    get = getattr(base, "get_decoder", None)
    decoder = base if get is None else get()
    if not hasattr(decoder, "set_attn_implementation"):
        return "its attention cannot be set"
    try:
        decoder.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        return str(error).splitlines()[0]
    return None if attention_of(config) == name else "its attention cannot be set"


def _unsupported(model: nn.Module, reason: str, way_out: str) -> UnsupportedTree:
    return UnsupportedTree(f"{model_name(model)} cannot run a tree: {reason}; {way_out}")
